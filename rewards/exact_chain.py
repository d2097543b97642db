"""Reward for the sums of `rlpost.testbed`: every step must be right, because a right sum alone may be luck."""

from __future__ import annotations

from rlpost.testbed import correct_chain
from rlpost.types import Rollout


def exact_chain(rollout: Rollout) -> float:
    """1 where the text is exactly the chain and the answer that follow from the prompt, else 0."""
    return float(rollout.text == correct_chain(str(rollout.task.prompt)))
