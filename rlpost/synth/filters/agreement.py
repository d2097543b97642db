"""The teacher must agree with itself."""

from __future__ import annotations

from rlpost.errors import RunError
from rlpost.synth.rows import Row, consensus


def agreement(row: Row, *, at_least: float = 0.6) -> str | None:
    """Why a problem goes, or None: too few of its solutions give the answer that most of them give.

    With one solution a problem there is nothing to compare, and everything with an answer passes. Self-consistency:
    Wang et al., arXiv:2203.11171.
    """
    if not 0 < at_least <= 1:
        raise RunError(f"synth.filters: agreement.at_least must be in (0, 1] (got {at_least})")
    answer, _, share = consensus(row["solutions"])
    return None if answer is not None and share >= at_least else "the teacher does not agree with itself"
