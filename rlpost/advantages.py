"""Advantages: what each rollout of a group is worth against the others. Pure functions on tensors `[G] -> [G]`."""

from __future__ import annotations

import torch
from torch import Tensor


def grpo(rewards_G: Tensor, *, scale_by_std: bool, eps: float = 1e-6) -> Tensor:
    """Group-relative advantage, `A_i = (r_i - mean(r)) / (std(r) + eps)`; GRPO section 4.1.2, arXiv:2402.03300.

    `std` has the unbiased divisor G - 1. Without `scale_by_std` only the mean is taken off (Dr. GRPO,
    arXiv:2503.20783). A group whose rewards are all equal gives exactly 0: the comparison is of the rewards
    themselves, because a float mean of equal numbers need not be that number. Rewards that are NaN (could not be
    judged) stay out of the mean and get 0.
    """
    judged_G = ~torch.isnan(rewards_G)
    judged = rewards_G[judged_G]
    advantages_G = torch.zeros_like(rewards_G)
    if judged.numel() < 2 or bool((judged == judged[0]).all()):
        return advantages_G
    centred = judged - judged.mean()
    advantages_G[judged_G] = centred / (judged.std() + eps) if scale_by_std else centred
    return advantages_G
