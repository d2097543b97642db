"""Reward for the form of an answer, as a small addition to a reward for its truth."""

from __future__ import annotations

from rewards._numbers import as_number
from rlpost.types import Rollout


def marked_answer(rollout: Rollout) -> float:
    """1 where the text ends by itself with a line `#### number`, else 0; whether the number is right counts nothing."""
    last = rollout.text.rstrip().rpartition("\n")[2]
    marked = last.startswith("####") and as_number(last.removeprefix("####")) is not None
    return float(marked and not rollout.truncated)
