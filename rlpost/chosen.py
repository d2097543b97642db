"""What a step trained on, for pictures: a line of `chosen.jsonl` with the chosen tasks by success, difficulty, source.

Quantiles are those of `QUANTILES`; success is what the policy did alone in this step, before it learned from it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.trackers import rewind_jsonl
from rlpost.types import Outcome, Task

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BINS = 12
"""Of success: none, the ten tenths between, all."""
SOURCES = 12
"""That are counted by name in a step; the others are `other`."""


class Chosen:
    """Collects the outcomes of a step's waves and writes one line; on ranks other than the main one it does nothing."""

    def __init__(self, run_dir: Path, tasks: Sequence[Task], *, difficulty: Mapping[str, float], writes: bool) -> None:
        self.path = run_dir / "chosen.jsonl"
        self.sources = {task.key: source_of(task) for task in tasks}
        self.difficulty = difficulty
        """Of tasks, from a file or a column, larger is harder; empty where nothing says."""
        self.writes = writes
        self._waves: list[Outcome] = []

    def rewind(self, step: int) -> None:
        """Forget the lines of `step` and later: the run continues there."""
        if self.writes:
            rewind_jsonl(self.path, step)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Take in a wave of all ranks."""
        if self.writes:
            self._waves += outcomes

    def write(self, step: int) -> None:
        """Append the step's line, and start the next step."""
        if self._waves:
            line = json.dumps({"step": step, **self.line(self._waves)}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self._waves = []

    def line(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The figures of one step's outcomes."""
        judged = [rate for one in outcomes if (rate := success(one)) is not None]
        known = [self.difficulty[one.key] for one in outcomes if one.key in self.difficulty]
        figures: dict[str, Any] = {
            "groups": len(outcomes),
            "tasks": len({one.key for one in outcomes}),
            "success": quantiles(judged),
            "success_bins": bins(judged),
            "source": top(Counter(self.sources.get(one.key, "added in the run") for one in outcomes)),
        }
        return figures | ({"difficulty": quantiles(known)} if known else {})


def success(outcome: Outcome) -> float | None:
    """The share of a task's judged rollouts that passed; None where none was judged."""
    judged = [passed for passed in outcome.passed if passed is not None]
    return sum(judged) / len(judged) if judged else None


def quantiles(values: Sequence[float]) -> list[float] | None:
    """The values at `QUANTILES`, between neighbours by proportion; None of nothing.

    >>> quantiles([4.0, 0.0, 2.0])
    [0.0, 0.4, 1.0, 2.0, 3.0, 3.6, 4.0]
    """
    if not values:
        return None
    ordered, found = sorted(values), []
    for q in QUANTILES:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        found.append(round(ordered[low] + (ordered[high] - ordered[low]) * (place - low), 6))
    return found


def bins(rates: Sequence[float]) -> list[int]:
    """How many rates are 0, in (0, 0.1), [0.1, 0.2), ..., [0.9, 1), and 1.

    >>> bins([0.0, 0.05, 0.1, 0.95, 1.0])
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    """
    counts = [0] * BINS
    for rate in rates:
        inside = min(int(rate * 10 + 1e-9), 9) + 1
        counts[0 if rate <= 0 else BINS - 1 if rate >= 1 else inside] += 1
    return counts


def top(counts: Counter[str]) -> dict[str, int]:
    """The most frequent, and the rest together."""
    shown = dict(counts.most_common(SOURCES))
    rest = sum(counts.values()) - sum(shown.values())
    return shown | ({"other": rest} if rest else {})


def source_of(task: Task) -> str:
    """Where a task came from: a column `source` or `dataset` of its own, or the file or function of all.

    >>> source_of(Task("a", "1+1=", extra={"source": "gsm8k"}, source="data.jsonl"))
    'gsm8k'
    """
    for column in ("source", "dataset"):
        value = task.extra.get(column)
        if isinstance(value, str) and value:
            return value[:80]
    return task.source[:80] or "tasks.train"


def difficulty_of_tasks(
    tasks: Sequence[Task], curriculum: Mapping[str, Any], columns: Sequence[str | None]
) -> dict[str, float]:
    """Difficulty by key: from what the curriculum's `difficulty` names, else from the first column that has numbers."""
    asked = curriculum.get("difficulty")
    found: list[float] = []
    if isinstance(asked, str) and asked and tasks:
        from curricula._files import difficulty_of

        with suppress(RunError):  # a curriculum of somebody's own may mean something else by it
            found = [float(value) for value in difficulty_of(tasks, asked)]
    for column in columns:
        if not found and column and any(math.isfinite(_number(task.extra.get(column))) for task in tasks[:100]):
            found = [_number(task.extra.get(column)) for task in tasks]
    return {task.key: value for task, value in zip(tasks, found, strict=False) if math.isfinite(value)}


def _number(value: Any) -> float:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric else math.nan
