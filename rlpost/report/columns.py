"""Figures of a run as columns that a page can draw: thinned, rounded, with intervals."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.history import History
from rlpost.report.intervals import interval

MOST_STEPS = 2000
"""That the page holds of a run; of more, evenly spaced ones."""
MOST_COLUMNS = 150
"""Of a picture of choices."""
BESIDES = ("step", "unix_s")
TRAIN_PASS = re.compile(r"rollouts/pass@\d+")
EVAL_PASS = re.compile(r"eval/pass@\d+")


def short(value: Any, digits: int = 5) -> float | None:
    """A number to so many digits; None where it is not one.

    >>> short(0.123456789), short(float("nan")), short(None)
    (0.12346, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.{digits}g}")


def evenly(num: int, most: int) -> list[int]:
    """At most `most` places of `num`, evenly spaced, with the first and the last.

    >>> evenly(3, 5), evenly(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    if num <= most:
        return list(range(num))
    return [round(i * (num - 1) / (most - 1)) for i in range(most)]


def step_columns(history: History) -> dict[str, Any]:
    """Every figure of the steps, with the step's number and the axes that add up."""
    steps = history.steps
    names = sorted({name for row in steps for name in row if name not in BESIDES})
    axes = _axes(steps)
    places = evenly(len(steps), MOST_STEPS)
    rows = [steps[i] for i in places]
    columns = {name: [short(row.get(name)) for row in rows] for name in names}
    bands = {
        name: [_train_interval(row, name) for row in rows]
        for name in names
        if TRAIN_PASS.fullmatch(name) or name == "reward/solved_frac"
    }
    return {
        "x": {"step": [row["step"] + 1 for row in rows]}
        | {name: [short(values[i]) for i in places] for name, values in axes.items()},
        "figures": columns,
        "bands": bands,
        "left_out": len(steps) - len(places),
    }


def eval_columns(history: History) -> dict[str, Any]:
    """Every figure of the evaluations, by steps done."""
    found = history.evaluations
    names = sorted({name for _, row in found for name in row if name.startswith("eval/")})
    at = _axes_at(history, [done for done, _ in found])
    return {
        "x": {"step": [done for done, _ in found]} | at,
        "figures": {name: [short(row.get(name)) for _, row in found] for name in names},
        "bands": {
            name: [rounded(eval_interval(row, name)) for _, row in found] for name in names if EVAL_PASS.fullmatch(name)
        },
        "left_out": 0,
    }


def eval_interval(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """95 % of a held-out pass@k."""
    return interval(row, name, problems=row.get("eval/num_problems") or 0, n=row.get("eval/n") or 1)


def rounded(pair: tuple[float, float] | None) -> list[float | None] | None:
    """An interval for the page."""
    return None if pair is None else [short(pair[0], 4), short(pair[1], 4)]


def _train_interval(row: Mapping[str, Any], name: str) -> list[float | None] | None:
    """Of the training prompts of a step: a group counts as a problem."""
    groups, rollouts = row.get("groups/num") or 0, row.get("rollouts/num") or 0
    if not groups:
        return None
    if name == "reward/solved_frac":
        if row.get("rollouts/pass@1") != row.get(name):  # another reward than the first decides as well
            return None
        name = "rollouts/pass@1"
    return rounded(interval(row, name, problems=groups, n=rollouts / groups))


def _axes(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What may stand below a curve beside the step: tokens, FLOPs and device-hours so far."""
    found = {}
    for axis, total, each, unit in (
        ("tokens", "total/tokens/generated", "tokens/generated", 1.0),
        ("FLOPs", "total/flops/total", "flops/total", 1.0),
        ("hours", "total/device_s", "time/step_s", 3600.0),
    ):
        if any(row.get(total) is not None for row in steps):
            found[axis] = _filled([row.get(total) for row in steps], unit)
        elif any(row.get(each) is not None for row in steps):
            sums, so_far = [], 0.0
            for row in steps:
                so_far += row.get(each) or 0.0
                sums.append(so_far / unit)
            found[axis] = sums
    return found


def _filled(values: Sequence[float | None], unit: float) -> list[float]:
    filled, last = [], 0.0
    for value in values:
        last = last if value is None else value / unit
        filled.append(last)
    return filled


def _axes_at(history: History, done: Sequence[int]) -> dict[str, list[float | None]]:
    """The same axes where an evaluation stands: what they were after so many steps."""
    steps = history.steps
    place = {row["step"] + 1: i for i, row in enumerate(steps)}
    return {
        axis: [0.0 if not n else short(values[place[n]]) if n in place else None for n in done]
        for axis, values in _axes(steps).items()
    }


def choice_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What was chosen over time, of neighbouring steps together where there are many; None where nothing says."""
    rows = [row for row in rows if row.get("success_bins")]
    if not rows:
        return None
    width = math.ceil(len(rows) / MOST_COLUMNS)
    parts = [rows[i : i + width] for i in range(0, len(rows), width)]
    sources = Counter[str]()
    for row in rows:
        sources.update(row.get("source") or {})
    names = [name for name, _ in sources.most_common()]
    return {
        "x": [part[0]["step"] + 1 for part in parts],
        "to": [part[-1]["step"] + 1 for part in parts],
        "bins": [
            [sum(counts) for counts in zip(*(row["success_bins"] for row in part), strict=True)] for part in parts
        ],
        "success": [_mean_rows([row.get("success") for row in part]) for part in parts],
        "difficulty": [_mean_rows([row.get("difficulty") for row in part]) for part in parts],
        "sources": {
            name: [sum((row.get("source") or {}).get(name, 0) for row in part) for part in parts] for name in names
        },
        "repeats": [
            short(sum(row["groups"] for row in part) / max(sum(row["tasks"] for row in part), 1)) for part in parts
        ],
    }


def _mean_rows(rows: Sequence[Sequence[float] | None]) -> list[float | None] | None:
    known = [row for row in rows if row]
    return [short(sum(column) / len(known)) for column in zip(*known, strict=True)] if known else None
