"""The table of algorithms: what each one is, where it is published, and its vetted defaults. The file to open first.

What a name does stands in `advantages.py` (rewards of a group -> advantages) and `losses.py` (log-probs and advantages
-> a loss per token); a recipe's `algorithm` section overrides single defaults.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AlgorithmDefaults:
    """What a recipe's `algorithm` fields become where they are left out.

    >>> ALGORITHMS["grpo"].clip_high
    0.28
    """

    summary: str
    paper: str
    clip_low: float
    clip_high: float
    scale_by_std: bool
    drop_zero_spread: bool
    kl_coef: float
    kl_estimator: str


ALGORITHMS: dict[str, AlgorithmDefaults] = {
    "grpo": AlgorithmDefaults(
        summary="rewards centred and scaled within a prompt's group; clipped ratio, mean over all tokens of the step",
        paper="GRPO: arXiv:2402.03300; clip_high > clip_low: DAPO, arXiv:2503.14476",
        clip_low=0.2,
        clip_high=0.28,
        scale_by_std=True,
        drop_zero_spread=True,
        kl_coef=0.0,
        kl_estimator="k3",
    ),
}
