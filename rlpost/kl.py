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
    reverse KL;  k3 = exp(-d) - 1 + d, unbiased and never negative (GRPO eq. 4, arXiv:2402.03300), with the gradient of
    the forward KL;  k1_plus and k3_plus have the value of k1 and k3 and the gradient of k2 (straight-through).
    """
    d_BT = (logp_BT - ref_logp_BT).clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT)
    if estimator == "k1":
        return d_BT
    if estimator == "k2":
        return _k2(d_BT)
    if estimator == "k3":
        return _k3(d_BT)
    if estimator == "k1_plus":
        return _with_gradient_of(d_BT, _k2(d_BT))
    if estimator == "k3_plus":
        return _with_gradient_of(_k3(d_BT), _k2(d_BT))
    raise ValueError(f"estimator must be k1, k2, k3, k1_plus or k3_plus (got {estimator!r})")


def corrected_k3(logp_BT: Tensor, behavior_logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """rho k3 with rho = pi / mu of the token, on tokens sampled from mu: unbiased in value and gradient. DeepSeek-V3.2.

    The gradient also passes through rho: d(rho k3) = rho (k3 + 1 - e^-d) dlogp = rho d dlogp, the reverse KL's. A ratio
    of the whole sequence in its place would add the k3 of the other tokens.
    """
    limit = KL_LOG_RATIO_LIMIT
    rho_BT = torch.exp((logp_BT - behavior_logp_BT).clamp(-limit, limit))
    return rho_BT * _k3((logp_BT - ref_logp_BT).clamp(-limit, limit))


def adapted_coef(coef: float, kl_mean: float, *, target: float, horizon: float, num_samples: int) -> float:
    """The next coefficient of an adaptive controller, which steers the mean KL towards `target`. arXiv:1909.08593.

    coef (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon), once a step; a fixed controller does not call it.

    >>> adapted_coef(0.1, kl_mean=3.0, target=1.0, horizon=10.0, num_samples=5)
    0.11000000000000001
    """
    error = min(max(kl_mean / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * num_samples / horizon)


def _k2(d_BT: Tensor) -> Tensor:
    return 0.5 * d_BT.square()


def _k3(d_BT: Tensor) -> Tensor:
    return torch.exp(-d_BT) - 1 + d_BT


def _with_gradient_of(value_BT: Tensor, carrier_BT: Tensor) -> Tensor:
    return value_BT.detach() + carrier_BT - carrier_BT.detach()
