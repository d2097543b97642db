"""Rewards that depend on an answer's length in tokens, to be added to the reward of the task. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence


def soft_overlong(length: int, *, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment, arXiv:2503.14476, eq. 13: 0 until `buffer` tokens are left, then down to -1.

    `clip((limit - buffer - length) / buffer, -1, 0)`; ScaleRL's ablated length penalty is the same function.

    >>> [soft_overlong(length, limit=100, buffer=20) for length in (80, 85, 100, 101)]
    [0.0, -0.25, -1.0, -1.0]
    """
    return min(0.0, max(-1.0, (limit - buffer - length) / buffer))


def kimi_length(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Kimi k1.5's length reward within a group, arXiv:2501.12599: 0.5 for the shortest answer, -0.5 for the longest.

    `0.5 - (length - min) / (max - min)` for a correct answer, at most 0 for a wrong one; 0 where all are equally long.

    >>> kimi_length([10, 20, 30, 10], [True, True, True, False])
    [0.5, 0.0, -0.5, 0.0]
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    bonus = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [value if right else min(0.0, value) for value, right in zip(bonus, correct, strict=True)]


def warmed_up(weight: float, *, step: int, warmup_steps: int) -> float:
    """Kimi's warm-up of the length reward: no penalty for the first steps (0-based), then a constant weight.

    >>> warmed_up(0.3, step=9, warmup_steps=10), warmed_up(0.3, step=10, warmup_steps=10)
    (0.0, 0.3)
    """
    return weight if step >= warmup_steps else 0.0


def cosine_length(length: int, *, limit: int, low: float, high: float) -> float:
    """ProRLv2's cosine of the length: `high` for an empty answer, falling to `low` at `limit` and beyond.

    `low + (high - low) (1 + cos(pi length / limit)) / 2`

    >>> [round(cosine_length(length, limit=100, low=-1.0, high=0.0), 6) for length in (0, 50, 100, 200)]
    [0.0, -0.5, -1.0, -1.0]
    """
    return low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * min(length, limit) / limit))


def switched_on(step: int, *, on: int, off: int) -> bool:
    """ProRLv2's schedule of the length penalty: `on` steps with it, then `off` steps without, over and over.

    >>> [switched_on(step, on=2, off=3) for step in range(6)]
    [True, True, False, False, False, True]
    """
    return step % (on + off) < on
