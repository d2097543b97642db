"""What the loop and a curriculum say to each other: a choice is checked before anything is generated for it.

Beside its five methods a curriculum may have

- `wants_measured() -> list[Task]`: tasks to be answered by the current policy before the next choice (`measure.py`),
  with `measure_tries` answers each (None: as in training); the outcomes are observed, and nothing is trained on them;
- `correction(key) -> float`: what a task chosen in this step counts in the loss, against the bias of the sampling;
- `add(tasks)`: take in tasks while the run goes on, and list them as `added`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlpost.errors import SharedError
from rlpost.types import Group, Task

if TYPE_CHECKING:
    from rlpost.document import Document
    from rlpost.world import Ranks

in_memory: ContextVar[bool] = ContextVar("in_memory", default=False)
"""Whether `state_dict` is asked for a copy to go back to in this process: what is costly to make text of may stay."""


@contextmanager
def kept_in_memory() -> Iterator[None]:
    """States that are asked for in this block never reach a file."""
    token = in_memory.set(True)
    try:
        yield
    finally:
        in_memory.reset(token)


def choice(run: Any, size: int) -> list[Task]:
    """The curriculum's next `size` tasks, the same on every rank; a faulty choice is one error on every rank."""
    tasks = run.curriculum.select(size)
    check_choice(tasks, size, run.curriculum, run.task_keys, run.world)
    return list(tasks)


def check_choice(
    tasks: Any,
    size: int | None,
    curriculum: Any,
    known: Collection[str] | None,
    world: Ranks,
    *,
    method: str = "select",
) -> None:
    """Raise where ranks differ, or where it is not a list of `size` (None: any number of) known tasks."""
    problem = _problem(tasks, size, curriculum, known)
    keys = "\n".join(task.key for task in tasks) if problem is None else problem
    every = world.all_gather_object((problem, hashlib.sha1(keys.encode()).hexdigest()))
    problem = next((found for found, _ in every if found is not None), None)
    if problem is None and len({digest for _, digest in every}) > 1:
        problem = (
            "the same tasks on every rank, and the ranks differ: it must follow from the seed and what it has observed "
            "alone, without a clock, the global random generators, or the order of a set"
        )
    if problem is not None:
        raise SharedError(f"curriculum.use: `{method}` of {type(curriculum).__name__} must return {problem}")


def _problem(tasks: Any, size: int | None, curriculum: Any, known: Collection[str] | None) -> str | None:
    """What is wrong with a choice, as the end of a sentence; None where nothing is."""
    if not isinstance(tasks, list):
        return f"a list of Task (got {type(tasks).__name__})"
    for task in tasks:
        if not isinstance(task, Task):
            return f"a list of Task (it has {task!r:.80}): return the tasks that it was made with, not their keys"
    if size is not None and len(tasks) != size:
        return (
            f"as many tasks as it is asked for (got {len(tasks)} of {size}): choose some again where they are too few"
        )
    if known is None:
        return None
    strange = [task.key for task in tasks if task.key not in known]
    if strange:
        added = {task.key for task in getattr(curriculum, "added", ())}
        strange = [key for key in strange if key not in added]
    if strange:
        return f"tasks that it was given (got {', '.join(strange[:5])}): those of tasks.train, or what `add` brought"
    return None


def corrected(documents: Sequence[Document], groups: Sequence[Group], curriculum: Any) -> list[Document]:
    """The documents with advantages times what the curriculum says that their task counts."""
    correction = getattr(curriculum, "correction", None)
    if correction is None:
        return list(documents)
    counts = {group.id: correction(group.task.key) for group in groups}
    return [replace(one, advantage=one.advantage * counts[one.group]) for one in documents]
