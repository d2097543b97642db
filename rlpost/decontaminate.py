"""Training tasks that are too like a held-out problem: a run of words in common, or nearly the same text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlpost.duplicates import near_duplicates, shingles
from rlpost.errors import RunError
from rlpost.task_recipe import Decontaminate
from rlpost.types import Task

log = logging.getLogger(__name__)
SHINGLE = 3
"""Words of a run in the comparison of whole texts."""
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a training task shares with a held-out one.

    >>> Overlap("a", "b", "ngram", 0.5, "a train leaves").share
    0.5
    """

    train: str
    held_out: str
    kind: str
    """`ngram` or `near`."""
    share: float
    """Of the held-out problem's runs that the training task has too; or the similarity of both."""
    text: str = ""
    """A run that they share."""


def overlaps(train: Sequence[Task], held_out: Sequence[Task], asked: Decontaminate) -> list[Overlap]:
    """What each training task shares with the held-out problem that it is most like; most have nothing."""
    found = {one.train: one for one in _near(train, held_out, asked.near)}
    found |= {one.train: one for one in _ngrams(train, held_out, asked.ngram)}
    return [found[task.key] for task in train if task.key in found]


def decontaminated(train: Sequence[Task], held_out: Sequence[Task], asked: Decontaminate) -> list[Task]:
    """The training tasks that are like no held-out one."""
    found = overlaps(train, held_out, asked) if held_out else []
    if not found:
        return list(train)
    shown = "; ".join(
        f"{one.train} is like {one.held_out}" + (f" ({one.text!r})" * bool(one.text)) for one in found[:SHOWN]
    )
    if asked.found == "refuse":
        raise RunError(
            f"tasks.decontaminate: no training task may be like a held-out one, and {len(found)} of {len(train)} are "
            f"({shown}): take them out, or set tasks.decontaminate.found=drop"
        )
    log.warning("tasks.decontaminate: left out %d of %d training tasks (%s)", len(found), len(train), shown)
    gone = {one.train for one in found}
    if not (left := [task for task in train if task.key not in gone]):
        raise RunError("tasks.decontaminate must leave a training task (all are like held-out ones): ask for less")
    return left


def text_of(task: Task) -> str:
    """The words of a task's prompt."""
    return task.prompt if isinstance(task.prompt, str) else "\n".join(message["content"] for message in task.prompt)


def _ngrams(train: Sequence[Task], held_out: Sequence[Task], size: int | None) -> list[Overlap]:
    """A held-out problem with fewer than `size` words is one run: only a training task that is the same has it."""
    if size is None:
        return []
    runs = [shingles(text_of(task), size) for task in held_out]
    index: dict[str, list[int]] = {}
    for place, own in enumerate(runs):
        for run in own:
            index.setdefault(run, []).append(place)
    found = []
    for task in train:
        shared: dict[int, list[str]] = {}
        for run in shingles(text_of(task), size):
            for place in index.get(run, ()):
                shared.setdefault(place, []).append(run)
        if shared:
            place, same = max(shared.items(), key=lambda pair: (len(pair[1]) / len(runs[pair[0]]), -pair[0]))
            found.append(Overlap(task.key, held_out[place].key, "ngram", len(same) / len(runs[place]), min(same)))
    return found


def _near(train: Sequence[Task], held_out: Sequence[Task], threshold: float | None) -> list[Overlap]:
    if threshold is None:
        return []
    texts, against = [text_of(task) for task in train], [text_of(task) for task in held_out]
    judged = near_duplicates(texts, against, threshold=threshold, shingle=SHINGLE)
    return [
        Overlap(task.key, held_out[near.place].key, "near", near.similarity)
        for task, near in zip(train, judged, strict=True)
        if near is not None and near.side == "against"
    ]


def counted(found: Sequence[Overlap]) -> Mapping[str, int]:
    """How many of each kind."""
    return {kind: sum(one.kind == kind for one in found) for kind in ("ngram", "near")}
