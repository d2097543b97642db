"""DAPO's penalty for answers that come near the limit."""

from __future__ import annotations

from rlpost.lengths import soft_overlong
from rlpost.types import Rollout


def length_overlong(rollout: Rollout, *, limit: int, buffer: int) -> float:
    """0 until `buffer` tokens below `limit`, then down to -1 at the limit. DAPO, arXiv:2503.14476, eq. 13."""
    return soft_overlong(len(rollout.token_ids), limit=limit, buffer=buffer)
