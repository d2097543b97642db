"""The cosine length reward, which pays correct answers to be short and wrong ones to be long; for `group_rewards`."""

from __future__ import annotations

from rlpost.lengths import cosine_length
from rlpost.types import Group


def length_cosine(
    group: Group,
    *,
    limit: int,
    right_short: float = 2.0,
    right_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    over: float = -10.0,
) -> list[float]:
    """Along a half cosine of length / limit, from `..._short` to `..._long`; `over` for what reached the limit.

    "Demystifying Long Chain-of-Thought", arXiv:2502.03373, section 4.1, with its table's values.
    """
    found = []
    for rollout in group.rollouts:
        length = len(rollout.token_ids)
        short, long = (right_short, right_long) if rollout.passed else (wrong_short, wrong_long)
        found.append(over if length >= limit else cosine_length(length, limit=limit, low=long, high=short))
    return found
