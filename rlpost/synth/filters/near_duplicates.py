"""No problem twice, none of the sources, and none that is held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlpost.duplicates import NearIndex
from rlpost.errors import RunError
from rlpost.recipe import TaskSource
from rlpost.synth.bench import Bench
from rlpost.synth.rows import Row
from rlpost.tasks import load_task_sets, load_tasks
from rlpost.types import Task


class NearDuplicates:
    """Problems near to an earlier one that stayed, to a task of `tasks.train` or `tasks.eval`, or to further sets."""

    def __init__(
        self,
        bench: Bench,
        *,
        threshold: float = 0.8,
        shingle: int = 3,
        held_out: list[dict[str, Any]] | None = None,
        sources: bool = True,
    ) -> None:
        """`held_out`: further sources, as under `tasks.eval`; `sources: false` leaves near copies of seeds in."""
        self.index = NearIndex(threshold=threshold, shingle=shingle)
        self.places: list[tuple[str, str]] = []
        """Of each text of the index: the set that it is of, and its key."""
        train, evaluation = load_task_sets(bench.recipe)
        sets = [("tasks.eval", evaluation), *(_further(one, i) for i, one in enumerate(held_out or []))]
        if sources:
            sets.append(("tasks.train", train))
        for name, tasks in sets:
            for task in tasks:
                self.index.add(text_of(task))
                self.places.append((name, task.key))

    def seen(self, row: Row) -> None:
        """Judge again what was judged before the command was interrupted: what stayed then is to be known now."""
        self._verdict(row)

    def stream(self, rows: Iterable[Row]) -> Iterator[Row]:
        """A verdict a row, with what it is near to and how near."""
        for row in rows:
            yield {"id": row["id"], **self._verdict(row)}

    def _verdict(self, row: Row) -> dict[str, Any]:
        found = self.index.find_or_add(row["prompt"])
        if found is None:
            self.places.append(("another", row["id"]))
            return {"reason": None}
        name, key = self.places[found[0]]
        return {"reason": f"near {name}", "near": key, "similarity": round(found[1], 3)}


def text_of(task: Task) -> str:
    """A task's prompt as one text."""
    return task.prompt if isinstance(task.prompt, str) else "\n".join(part["content"] for part in task.prompt)


def _further(source: dict[str, Any], i: int) -> tuple[str, list[Task]]:
    try:
        asked = TaskSource(**{"answer": None, "duplicates": "drop", **source})
    except TypeError as error:
        raise RunError(f"synth: near_duplicates.held_out.{i} must have the keys of tasks.eval ({error})") from None
    return source["path"], load_tasks(asked, f"synth: near_duplicates.held_out.{i}")
