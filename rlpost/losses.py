"""Policy losses per token, and the one reducer. Pure functions on tensors; none writes into an argument.

Shapes: `B` rows of a packed micro-batch, `T` positions. `logp_BT` is the policy being trained, `behavior_logp_BT` the
distribution that the tokens were sampled from. Positions under the mask hold finite values (`batch.py` sees to it).
"""

from __future__ import annotations

import torch
from torch import Tensor

Stats = dict[str, Tensor]
"""Per-token figures `[B, T]` for the log, detached."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before `exp`: e^20 is far outside every clip range, and finite in bfloat16."""


def ppo_clip(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Stats]:
    """Clipped surrogate. PPO eq. 7, arXiv:1707.06347; clip_high > clip_low: DAPO eq. 10, arXiv:2503.14476.

    L_t = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t),  rho_t = pi(a_t) / mu(a_t)
    """
    log_rho_BT = (logp_BT - behavior_logp_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    rho_BT = torch.exp(log_rho_BT)
    clipped_BT = rho_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = -torch.minimum(rho_BT * adv_BT, clipped_BT * adv_BT)
    return loss_BT, {"ratio": rho_BT.detach(), "clipped": (clipped_BT * adv_BT < rho_BT * adv_BT).float()}


def nll(logp_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the target, in nats: the loss of supervised training."""
    return -logp_BT


def reduce_tokens(x_BT: Tensor, mask_BT: Tensor, step_tokens: int, dp_size: int) -> Tensor:
    """Mean over the trained tokens of the whole optimizer step: the only place that divides a loss.

    `step_tokens` counts all ranks and all micro-batches, so micro-batch losses add up to the mean. The engine averages
    gradients over `dp_size` ranks; multiplying by it undoes that. Zero where there is nothing to train.
    """
    kept_BT = torch.where(mask_BT, x_BT, torch.zeros_like(x_BT))
    return kept_BT.sum() * (dp_size / max(step_tokens, 1))
