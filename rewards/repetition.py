"""Penalty for going round in circles."""

from __future__ import annotations

from rlpost.types import Rollout


def repetition(rollout: Rollout, *, n: int = 4, most: float = 1.0, free: float = 0.0, unit: str = "tokens") -> float:
    """-most x share of n-grams that are copies of earlier ones, beyond the share that is `free`; 0 where none is.

    -most (1 - distinct / all): the repetition penalty of "Demystifying Long Chain-of-Thought", arXiv:2502.03373,
    app. F. `unit`: `tokens`, or `words` as white space has them.
    """
    if unit not in ("tokens", "words"):
        raise ValueError(f"repetition.unit must be tokens or words (got {unit!r})")
    items = rollout.token_ids if unit == "tokens" else tuple(rollout.text.lower().split())
    num = len(items) - n + 1
    if num < 1:
        return 0.0
    copies = 1 - len({items[i : i + n] for i in range(num)}) / num
    return min(0.0, -most * (copies - free) / (1 - free)) if free < 1 else 0.0
