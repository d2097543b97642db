"""Tables of difficulty that curricula read: JSON lines with a `key`, as `rlpost difficulty` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError
from rlpost.plugins import did_you_mean
from rlpost.types import Task

if TYPE_CHECKING:
    import numpy as np


def rows_of(path: str, where: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; `where` is the recipe key that named it."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise RunError(
            f"{where}: the file {path} must exist (relative paths start at the current folder): make it with "
            f"`rlpost difficulty RECIPE --out {path}`"
        )
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict) or "key" not in row:
                raise RunError(
                    f"{where}: every line of {path} must be a JSON object with a `key` (line {number} is not)"
                )
            yield row


def is_file(difficulty: str) -> bool:
    """Whether a `difficulty` parameter names a file, and not a column of the tasks.

    >>> is_file("runs/difficulty.jsonl"), is_file("terms")
    (True, False)
    """
    return difficulty.endswith((".jsonl", ".json")) or "/" in difficulty


def difficulty_of(tasks: Sequence[Task], difficulty: str, *, where: str = "curriculum.difficulty") -> np.ndarray:
    """Difficulty `[tasks]`, larger is harder, NaN where it is not known: a file's column, or a column of the tasks.

    A file may have several rows a key, one a model: their mean counts.
    """
    import numpy as np

    if is_file(difficulty):
        found = _of_file(difficulty, where)
        values = np.array([found.get(task.key, math.nan) for task in tasks], dtype=np.float64)
        known = f"{difficulty} has none of the keys of tasks.train"
    else:
        values = np.array([_number(task.extra.get(difficulty)) for task in tasks], dtype=np.float64)
        columns = sorted({name for task in tasks[:100] for name in task.extra})
        hint = did_you_mean(difficulty, columns)
        known = f"tasks.train has no numbers in `{difficulty}`{hint}; its extra columns are {columns}"
    if len(tasks) and np.isnan(values).all():
        raise RunError(
            f"{where} must be a file of `rlpost difficulty`, or a column of numbers in tasks.train.extra ({known})"
        )
    return values


def counts_of(tasks: Sequence[Task], path: str, *, where: str = "curriculum.difficulty") -> np.ndarray:
    """Passes and tries `[tasks, 2]` of the file's rows that have them, over all models; 0 where there are none."""
    import numpy as np

    places = {task.key: i for i, task in enumerate(tasks)}
    counts = np.zeros((len(tasks), 2), dtype=np.float64)
    for row in rows_of(path, where):
        if row["key"] in places and "passes" in row and "tries" in row:
            counts[places[row["key"]]] += row["passes"], row["tries"]
    return counts


def _of_file(path: str, where: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows_of(path, where):
        value = _number(row.get("difficulty"))
        if not math.isnan(value):
            found.setdefault(str(row["key"]), []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _number(value: Any) -> float:
    """A finite number, or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
