"""Weights for the mismatch between trainer and generator, and what to log of it. Pure functions on tensors.

rho_t = pi_prox(a_t) / mu(a_t): `prox_logp` is the trainer's own before the step's first update, `behavior_logp` the
generator's, at the same weights. A run is *decoupled* when the policy loss takes its ratio against `prox_logp` and is
multiplied by one of these weights; in *bypass* mode the ratio is against `behavior_logp`, which contains rho already,
and no weight is used.

Every weight is `[B, T]`, detached, and 1 where `mask_BT` is False. Weights multiply: `tis_token * geometric_rejection`
truncates the tokens of the sequences that are kept. A token whose weight is 0 stays in the denominator of the loss.
A *sequence* weight is of the product of the token ratios, which shrinks or explodes with the length; *geometric* is of
their geometric mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.losses import LOG_RATIO_LIMIT
from rlpost.masked import blank, segment_mean, segment_sum


def tis_token(prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, mask_BT: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling, min(rho_t, cap); caps of 1.5 to 5 are usual."""
    return _exp(_log_rho(prox_logp_BT, behavior_logp_BT, mask_BT)).clamp(max=cap)


def tis_sequence(
    prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor, cap: float
) -> Tensor:
    """Truncated importance sampling of whole sequences, min(prod_t rho_t, cap)."""
    return _exp(segment_sum(_log_rho(prox_logp_BT, behavior_logp_BT, mask_BT), document_BT, mask_BT)).clamp(max=cap)


def mis_token(prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, mask_BT: Tensor, cap: float) -> Tensor:
    """Masked importance sampling, rho_t where rho_t <= cap, else 0."""
    rho_BT = _exp(_log_rho(prox_logp_BT, behavior_logp_BT, mask_BT))
    return _keep(rho_BT, (rho_BT <= cap) | ~mask_BT)


def mis_sequence(
    prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor, cap: float
) -> Tensor:
    """Masked importance sampling of whole sequences, prod_t rho_t where that is <= cap, else 0."""
    log_rho_BT = _log_rho(prox_logp_BT, behavior_logp_BT, mask_BT)
    weight_BT = _exp(segment_sum(log_rho_BT, document_BT, mask_BT))
    return _keep(weight_BT, weight_BT <= cap)


def icepop(prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, mask_BT: Tensor, low: float, high: float) -> Tensor:
    """IcePop: rho_t where low <= rho_t <= high, else 0; 0.5 and 5 are usual."""
    rho_BT = _exp(_log_rho(prox_logp_BT, behavior_logp_BT, mask_BT))
    return _keep(rho_BT, ((rho_BT >= low) & (rho_BT <= high)) | ~mask_BT)


def geometric_rejection(
    prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> Tensor:
    """1 for a sequence with low <= exp(mean_t log rho_t) <= high, else 0; 0.999 and 1.001 are usual."""
    log_rho_BT = _log_rho(prox_logp_BT, behavior_logp_BT, mask_BT)
    mean_BT = _exp(segment_mean(log_rho_BT, document_BT, mask_BT))
    return _keep(torch.ones_like(mean_BT), ((mean_BT >= low) & (mean_BT <= high)) | ~mask_BT)


def k3_rejection(
    prox_logp_BT: Tensor, behavior_logp_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor, limit: float
) -> Tensor:
    """1 for a sequence with mean_t (rho_t - 1 - log rho_t) <= limit nats, else 0; 0.001 to 0.01 is usual."""
    log_rho_BT = _log_rho(prox_logp_BT, behavior_logp_BT, mask_BT)
    k3_BT = segment_mean(_k3(log_rho_BT), document_BT, mask_BT)
    return _keep(torch.ones_like(k3_BT), k3_BT <= limit)


def mismatch_summary(log_rho_N: Tensor, weight_N: Tensor) -> dict[str, float]:
    """Figures of N trained tokens, of all ranks and micro-batches together; nothing to say of none.

    `logp_diff_*` of |log rho| in nats; k1 and k3 estimate KL(generator || trainer) in nats a token; `ess_frac` is
    (sum w)^2 / (N sum w^2); `clipped_frac` counts the weights that are not rho.
    """
    if not log_rho_N.numel():
        return {}
    log_rho_N, weight_N = log_rho_N.double(), weight_N.double()
    diff_N = log_rho_N.abs()
    squares = weight_N.square().sum()
    # The weights came through float32, so a weight that was left alone differs from rho by rounding.
    clipped_N = ~torch.isclose(weight_N, _exp(_limited(log_rho_N)), rtol=1e-4, atol=0.0)
    return {
        "logp_diff_mean": float(diff_N.mean()),
        "logp_diff_p99": quantile(diff_N, 0.99),
        "logp_diff_max": float(diff_N.max()),
        "k1": float(-log_rho_N.mean()),
        "k3": float(_k3(_limited(log_rho_N)).mean()),
        "ess_frac": float(weight_N.sum().square() / (len(weight_N) * squares)) if squares > 0 else 0.0,
        "clipped_frac": float(clipped_N.double().mean()),
    }


def mismatch_by_age(log_rho_N: Tensor, weight_N: Tensor, age_N: Tensor) -> dict[int, dict[str, float]]:
    """`mismatch_summary` for each age: how many policy versions lie between a token's writing and its training."""
    ages = sorted({int(age) for age in age_N.unique()})
    return {age: mismatch_summary(log_rho_N[age_N == age], weight_N[age_N == age]) for age in ages}


def ratio_summary(log_rho_N: Tensor) -> dict[str, float]:
    """Quantiles and effective sample size of N ratios exp(log rho) of off-policy tokens; nothing to say of none."""
    if not log_rho_N.numel():
        return {}
    rho_N = _exp(log_rho_N.double())
    ess = float(rho_N.sum().square() / (len(rho_N) * rho_N.square().sum()))
    return {"ess_frac": ess} | {f"ratio_p{round(100 * q)}": quantile(rho_N, q) for q in (0.1, 0.5, 0.9, 0.99)}


def quantile(values_N: Tensor, q: float) -> float:
    """The smallest value that at least a share `q` of all do not exceed; `torch.quantile` stops at 2^24 values."""
    rank = min(max(-int(-q * values_N.numel() // 1), 1), values_N.numel())
    return float(values_N.flatten().kthvalue(rank).values)


def _log_rho(prox_logp_BT: Tensor, behavior_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    prox_BT, behavior_BT = blank(mask_BT, prox_logp_BT.detach(), behavior_logp_BT.detach())
    return _limited(prox_BT - behavior_BT)


def _limited(log_rho: Tensor) -> Tensor:
    return log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _exp(log_rho: Tensor) -> Tensor:
    return torch.exp(_limited(log_rho))


def _k3(log_rho: Tensor) -> Tensor:
    return torch.exp(log_rho) - 1 - log_rho


def _keep(weight_BT: Tensor, kept_BT: Tensor) -> Tensor:
    return torch.where(kept_BT, weight_BT, torch.zeros_like(weight_BT))
