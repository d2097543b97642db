"""Kimi k1.5's reward for being shorter than the rest of the group; list it under `group_rewards`."""

from __future__ import annotations

from rlpost.lengths import kimi_length
from rlpost.types import Group


def length_kimi(group: Group) -> list[float]:
    """0.5 for the shortest answer to -0.5 for the longest, and at most 0 for a wrong one. arXiv:2501.12599."""
    return kimi_length([len(one.token_ids) for one in group.rollouts], [bool(one.passed) for one in group.rollouts])
