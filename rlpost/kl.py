"""Estimators of KL(policy || reference) per token, on tokens sampled from the policy. Schulman, "Approximating KL
divergence" (2020); which of them has the right gradient: arXiv:2512.21852.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_LOG_RATIO_LIMIT = 10.0


def kl(estimator: str, logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """KL of each token `[B, T]` in nats, with d = logp - ref_logp clamped to +-10.

    k1 = d, unbiased, and as a loss its expected gradient is zero;  k2 = d^2 / 2, biased, with the gradient of the
    reverse KL;  k3 = exp(-d) - 1 + d, unbiased and never negative (GRPO eq. 4, arXiv:2402.03300).
    """
    d_BT = (logp_BT - ref_logp_BT).clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT)
    if estimator == "k1":
        return d_BT
    if estimator == "k2":
        return 0.5 * d_BT.square()
    if estimator == "k3":
        return torch.exp(-d_BT) - 1 + d_BT
    raise ValueError(f"estimator must be k1, k2 or k3 (got {estimator!r})")
