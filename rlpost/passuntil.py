"""How often a model solves a problem, also where that is rare: PassUntil, arXiv:2310.03262.

Answers are drawn until some pass, so that a pass rate of one in a thousand is not taken for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlpost.types import Group, Rollout, Task

PASSES = 3
"""How many passes PassUntil waits for."""
Answer = Callable[[Sequence[tuple[int, Task]], int, int], list[Group]]
"""(places, answers a task, turn) -> scored groups whose id is their place."""


def until_passes(
    answer: Answer, places: Sequence[tuple[int, Task]], *, n: int, until: int | None
) -> list[list[Rollout]]:
    """The rollouts of each (place, task): n, and on where fewer than `PASSES` of them pass, up to `until`.

    Each further turn doubles what was drawn, so that the number of turns is a logarithm.
    """
    found: dict[int, list[Rollout]] = {place: [] for place, _ in places}
    pending, drawn, turn = list(places), 0, 0
    while pending:
        size = n if not turn else min(drawn, (until or 0) - drawn)
        for group in answer(pending, size, turn):
            found[group.id] += group.rollouts
        drawn, turn = drawn + size, turn + 1
        rare = drawn < (until or 0)
        pending = [pair for pair in pending if rare and _passes(found[pair[0]]) < PASSES]
    return [found[place] for place, _ in places]


def _passes(rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.passed is True for rollout in rollouts)


def estimate(passed: Sequence[bool | None], n: int) -> dict[str, Any]:
    """Pass rate, Wilson's 95 % interval and difficulty of a task that was tried n times, and on until `PASSES` passes.

    Of the first n answers k pass: k / n where k >= r or nothing more was drawn, r = PASSES. Else K is the draw of the
    r-th pass, and p = (r - 1) / (K - 1), where r / K, PassUntil's estimate (arXiv:2310.03262), is too high; and k / N
    where all N draws had k < r. Together this is unbiased for every p. Answers that could not be judged count nowhere.

    >>> estimate([False, True, False, False], n=4)["pass_rate"]
    0.25
    >>> estimate([False] * 4 + [True, False, True, True, False], n=4)["pass_rate"]   # (3 - 1) / (8 - 1)
    0.2857142857142857
    """
    first = [flag for flag in passed[:n] if flag is not None]
    flags = [flag for flag in passed if flag is not None]
    whole = [i + 1 for i, flag in enumerate(flags) if flag]
    if len(passed) <= n or sum(first) >= PASSES:
        passes, tries = sum(first), len(first)
        rate = passes / tries if tries else None
    elif len(whole) >= PASSES:
        passes, tries = PASSES, whole[PASSES - 1]
        rate = (passes - 1) / (tries - 1)
    else:
        passes, tries = len(whole), len(flags)
        rate = passes / tries if tries else None
    low, high = wilson(passes, tries)
    said = {"passes": passes, "tries": tries, "unjudged": len(passed) - len(flags), "pass_rate": rate}
    return said | {"low": low, "high": high, "difficulty": None if rate is None else 1 - rate}


def wilson(passes: int, tries: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, 95 %; it has a width also at 0 and 1.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    >>> [round(x, 4) for x in wilson(0, 10)], [round(x, 4) for x in wilson(5, 10)]
    ([0.0, 0.2775], [0.2366, 0.7634])
    """
    if not tries:
        return 0.0, 1.0
    p, part = passes / tries, z * z / tries
    half = z * math.sqrt(p * (1 - p) / tries + part / 4 / tries)
    return max(0.0, (p + part / 2 - half) / (1 + part)), min(1.0, (p + part / 2 + half) / (1 + part))
