"""Entropy: a bonus with a fixed or an adaptive coefficient, and training on the high-entropy tokens only."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_bonus(entropy_BT: Tensor, *, coef: float) -> Tensor:
    """The loss -coef H_t; `entropy_BT` in nats, with its gradient."""
    return -coef * entropy_BT


def adapted_entropy_coef(coef: float, entropy: float, *, target: float, delta: float, low: float, high: float) -> float:
    """The next adaptive coefficient: up by `delta` while the mean entropy is <= target nats, else down. Skywork-OR1.

    Once an optimizer step, from the token-weighted mean over all ranks; the bonus applies while entropy <= target.

    >>> adapted_entropy_coef(0.5, entropy=0.1, target=0.2, delta=0.25, low=0.0, high=0.6)
    0.6
    """
    return min(max(coef + (delta if entropy <= target else -delta), low), high)


def entropy_threshold(entropy_N: Tensor, *, frac: float) -> float:
    """The entropy that floor(frac N), at least one, of the step's N trained tokens reach (0.2 in arXiv:2506.01939)."""
    return float(torch.topk(entropy_N, max(int(frac * entropy_N.numel()), 1)).values[-1])


def top_entropy_mask(entropy_BT: Tensor, mask_BT: Tensor, *, threshold: float) -> Tensor:
    """True at the trained tokens whose entropy reaches the step's threshold; the others stay in the denominator."""
    return mask_BT & (torch.where(mask_BT, entropy_BT, -torch.inf) >= threshold)
