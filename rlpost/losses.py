"""Losses per token, and the one reducer. Pure functions on tensors; none writes into an argument.

Shapes: `B` rows of a packed micro-batch, `T` positions. `logp_BT` is the policy being trained, `behavior_logp_BT` the
denominator of the ratio: what the tokens were sampled with, or the trainer's own `prox_logp` where a run decouples the
two (`mismatch.py`). A loss that looks at one token at a time wants finite values everywhere (`masked.blank` sees to
it). One that looks at a whole sequence also takes `document_BT` and `mask_BT` (see `masked.py`), does that itself, and
puts at each trained token a loss whose sum with weights 1 / length is the loss of the sequence, where nothing else is
said. No loss divides by a count of the batch: `aggregation.py` does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.masked import blank, segment_mean, segment_sum

Stats = dict[str, Tensor]
"""Per-token figures `[B, T]` for the log, detached."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before `exp`: e^20 is far outside every clip range, and finite in bfloat16."""

VESPO_LOG_WEIGHT_FLOOR = math.log(1e-8)
"""Lower clamp of VESPO's log-weight of a sequence, as in TRL."""


def log_ratio(logp_BT: Tensor, behavior_logp_BT: Tensor) -> Tensor:
    """log rho = logp - behavior_logp, clamped to +-LOG_RATIO_LIMIT."""
    return (logp_BT - behavior_logp_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ppo_clip(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Stats]:
    """Clipped surrogate. PPO eq. 7, arXiv:1707.06347; clip_high > clip_low: DAPO eq. 10, arXiv:2503.14476.

    L_t = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t),  rho_t = pi(a_t) / mu(a_t)
    """
    return _clipped(torch.exp(log_ratio(logp_BT, behavior_logp_BT)), adv_BT, clip_low, clip_high)


def ppo_dual_clip(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Stats]:
    """`ppo_clip`, bounded where A < 0 by -dual_clip A, dual_clip > 1 (3 in the paper). arXiv:1912.09729."""
    loss_BT, stats = ppo_clip(logp_BT, behavior_logp_BT, adv_BT, clip_low=clip_low, clip_high=clip_high)
    bounded_BT = (adv_BT < 0) & (stats["ratio"] > dual_clip)
    bound_BT = torch.where(bounded_BT, -dual_clip * adv_BT, loss_BT)
    return bound_BT, stats | {"clipped": torch.maximum(stats["clipped"], bounded_BT.float())}


def two_sided(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, clip_low: float, clip_high: float, ratio_cap: float
) -> tuple[Tensor, Stats]:
    """Clipped surrogate whose unclipped branch is capped as well (4 in INTELLECT-2).

    L_t = -min(min(rho_t, ratio_cap) A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t). With ratio_cap > 1 + clip_high
    it is the dual clip.
    """
    rho_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT))
    loss_BT, stats = _clipped(rho_BT.clamp(max=ratio_cap), adv_BT, clip_low, clip_high)
    capped_BT = (rho_BT > ratio_cap) & (adv_BT != 0)
    return loss_BT, {"ratio": rho_BT.detach(), "clipped": torch.maximum(stats["clipped"], capped_BT.float())}


def gspo(
    logp_BT: Tensor,
    behavior_logp_BT: Tensor,
    adv_BT: Tensor,
    *,
    document_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate of the sequence's length-normalised ratio; one advantage a sequence. arXiv:2507.18071.

    L = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),  s = exp(mean_t log rho_t);  clips 3e-4 / 4e-4 in the paper.
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    mean_BT = segment_mean(logp_BT - behavior_logp_BT, document_BT, mask_BT)
    return _clipped(torch.exp(mean_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)), adv_BT, clip_low, clip_high)


def gspo_token(
    logp_BT: Tensor,
    behavior_logp_BT: Tensor,
    adv_BT: Tensor,
    *,
    document_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Stats]:
    """GSPO with an advantage for each token. arXiv:2507.18071.

    L_t = -min(s_t A_t, clip(s_t) A_t),  s_t = sg[s] pi(a_t) / sg[pi(a_t)]: the value of `gspo`, a gradient per token.
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    mean_BT = segment_mean((logp_BT - behavior_logp_BT).detach(), document_BT, mask_BT)
    log_s_BT = mean_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) + logp_BT - logp_BT.detach()
    return _clipped(torch.exp(log_s_BT), adv_BT, clip_low, clip_high)


def gmpo(
    logp_BT: Tensor,
    behavior_logp_BT: Tensor,
    adv_BT: Tensor,
    *,
    document_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Stats]:
    """Geometric mean of the clipped token ratios; one advantage a sequence. arXiv:2507.20673.

    L = -A exp(mean_t c_t),  c_t = min(log rho_t, clip_high) where A > 0, max(log rho_t, -clip_low) where A < 0.
    The clips are in log space (0.4 in the paper).
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    log_rho_BT = logp_BT - behavior_logp_BT
    bounded_BT = torch.where(adv_BT > 0, log_rho_BT.clamp(max=clip_high), log_rho_BT.clamp(min=-clip_low))
    mean_BT = segment_mean(bounded_BT, document_BT, mask_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = torch.exp(mean_BT)
    clipped_BT = (bounded_BT != log_rho_BT) & (adv_BT != 0)
    return -adv_BT * ratio_BT, {"ratio": ratio_BT.detach(), "clipped": clipped_BT.float()}


def cispo(logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, ratio_cap: float) -> tuple[Tensor, Stats]:
    """REINFORCE with a truncated importance weight. MiniMax-M1, arXiv:2506.13585; cap 4-8: ScaleRL, arXiv:2510.13786.

    L_t = -sg(min(rho_t, ratio_cap)) A_t log pi(a_t): a token beyond the cap keeps its gradient, unlike with a clip.
    """
    rho_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT)).detach()
    loss_BT = -rho_BT.clamp(max=ratio_cap) * adv_BT * logp_BT
    return loss_BT, {"ratio": rho_BT, "clipped": (rho_BT > ratio_cap).float()}


def sapo(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, tau_pos: float, tau_neg: float
) -> tuple[Tensor, Stats]:
    """A sigmoid in place of the clip, with the slope of the ratio at 1. arXiv:2511.20347 (tau 1.0 / 1.05 there).

    L_t = -(4 / tau) sigmoid(tau (rho_t - 1)) A_t,  tau = tau_pos where A > 0, else tau_neg
    """
    rho_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT))
    tau_BT = torch.where(adv_BT > 0, tau_pos, tau_neg).to(rho_BT.dtype)
    loss_BT = -(4 / tau_BT) * torch.sigmoid(tau_BT * (rho_BT - 1)) * adv_BT
    return loss_BT, {"ratio": rho_BT.detach(), "clipped": torch.zeros_like(rho_BT)}


def vespo(
    logp_BT: Tensor,
    behavior_logp_BT: Tensor,
    adv_BT: Tensor,
    *,
    document_BT: Tensor,
    mask_BT: Tensor,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> tuple[Tensor, Stats]:
    """REINFORCE with a soft kernel of the sequence's whole ratio. arXiv:2602.10693 (k, lambda 2, 3 and 3, 2 in TRL).

    L_t = -sg(phi(w)) A_t log pi(a_t),  phi(w) = e^lambda w^k e^(-lambda w),  w = prod_t rho_t,  phi(1) = 1
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    log_rho_BT = log_ratio(logp_BT, behavior_logp_BT).detach()
    log_w_BT = segment_sum(log_rho_BT, document_BT, mask_BT).clamp(VESPO_LOG_WEIGHT_FLOOR, LOG_RATIO_LIMIT)
    k_BT = torch.where(adv_BT >= 0, k_pos, k_neg).to(log_w_BT.dtype)
    lambda_BT = torch.where(adv_BT >= 0, lambda_pos, lambda_neg).to(log_w_BT.dtype)
    phi_BT = torch.exp(lambda_BT + k_BT * log_w_BT - lambda_BT * torch.exp(log_w_BT))
    return -phi_BT * adv_BT * logp_BT, {"ratio": torch.exp(log_rho_BT), "weight": phi_BT}


def dppo_tv(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, tv_low: float, tv_high: float, ratio_cap: float
) -> tuple[Tensor, Stats]:
    """REINFORCE within a trust region of probabilities, not of ratios (binary TV). arXiv:2602.04879.

    L_t = -sg(min(rho_t, ratio_cap)) A_t log pi(a_t), and 0 where pi - mu > tv_high with A > 0, or < -tv_low with A <= 0
    """
    rho_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT)).detach()
    moved_BT = torch.exp(logp_BT.detach()) - torch.exp(behavior_logp_BT)
    inside_BT = torch.where(adv_BT > 0, moved_BT <= tv_high, moved_BT >= -tv_low)
    loss_BT = -rho_BT.clamp(max=ratio_cap) * inside_BT * adv_BT * logp_BT
    return loss_BT, {"ratio": rho_BT, "clipped": (~inside_BT).float()}


def clip_cov(
    logp_BT: Tensor,
    behavior_logp_BT: Tensor,
    adv_BT: Tensor,
    *,
    mask_BT: Tensor,
    draw_BT: Tensor,
    clip_low: float,
    clip_high: float,
    frac: float,
    cov_low: float,
    cov_high: float,
) -> tuple[Tensor, Stats]:
    """`ppo_clip`, without a random few of the tokens that lower the entropy most. arXiv:2505.22617.

    Of the tokens that are not clipped and have cov_low < cov_t < cov_high, floor(frac N), at least one, lose their
    gradient: those with the lowest `draw_BT`, uniform random numbers. Chosen within the micro-batch of N tokens.
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    loss_BT, stats = ppo_clip(logp_BT, behavior_logp_BT, adv_BT, clip_low=clip_low, clip_high=clip_high)
    cov_BT = token_covariance(logp_BT, adv_BT, mask_BT)
    eligible_BT = mask_BT & (stats["clipped"] == 0) & (cov_BT > cov_low) & (cov_BT < cov_high)
    dropped_BT = _largest(-draw_BT, eligible_BT, _share(mask_BT, frac))
    return torch.where(dropped_BT, torch.zeros_like(loss_BT), loss_BT), stats | {"cov_clipped": dropped_BT.float()}


def kl_cov(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, mask_BT: Tensor, frac: float, coef: float
) -> tuple[Tensor, Stats]:
    """Unclipped surrogate, with a penalty on the tokens that lower the entropy most. arXiv:2505.22617.

    L_t = -rho_t A_t, + coef |log rho_t| for the floor(frac N), at least one, with the largest cov_t of the micro-batch
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    log_rho_BT = log_ratio(logp_BT, behavior_logp_BT)
    penalised_BT = _largest(token_covariance(logp_BT, adv_BT, mask_BT), mask_BT, _share(mask_BT, frac))
    loss_BT = -torch.exp(log_rho_BT) * adv_BT + coef * penalised_BT * log_rho_BT.abs()
    return loss_BT, {"ratio": torch.exp(log_rho_BT).detach(), "cov_penalised": penalised_BT.float()}


def reinforce(logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor) -> tuple[Tensor, Stats]:
    """L_t = -A_t log pi(a_t), with no correction of the ratio. Williams (1992)."""
    return -adv_BT * logp_BT, {"ratio": torch.exp(log_ratio(logp_BT, behavior_logp_BT)).detach()}


def importance(logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor) -> tuple[Tensor, Stats]:
    """L_t = -rho_t A_t, neither clipped nor shaped: unbiased for answers of one token, whoever wrote them."""
    rho_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT))
    return -rho_BT * adv_BT, {"ratio": rho_BT.detach()}


def importance_sequence(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Stats]:
    """L = -A prod_t rho_t: unbiased for answers of any length, and of a variance that grows with it."""
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    log_rho_BT = segment_sum(logp_BT - behavior_logp_BT, document_BT, mask_BT)
    rho_BT = torch.exp(log_rho_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return -rho_BT * adv_BT, {"ratio": rho_BT.detach()}


def shaped(logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, gamma: float) -> tuple[Tensor, Stats]:
    """L_t = -f(rho_t) A_t, f(x) = x / (x + gamma): tokens that the policy finds unlikely learn most, none is clipped.

    f'(x) = gamma / (x + gamma)^2. LUFFY, arXiv:2504.14945 (gamma .1, behaviour probability 1); Guide, arXiv:2506.13923
    (gamma a quantile of the ratios).
    """
    rho_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT))
    return -rho_BT / (rho_BT + gamma) * adv_BT, {"ratio": rho_BT.detach()}


def kimi_mirror(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor, tau: float
) -> tuple[Tensor, Stats]:
    """Mirror descent with the sequence's log-ratio squared. Kimi k1.5, arXiv:2501.12599.

    Summed over a sequence: L = -A log pi(y) + (tau / 2) (log pi(y) / mu(y))^2, to be aggregated by `seq_sum_const`.
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT, behavior_logp_BT, adv_BT)
    log_rho_BT = logp_BT - behavior_logp_BT
    # sum * mean = sum^2 / length: each token carries its share, and the tokens of a sequence add up to the square.
    square_BT = segment_sum(log_rho_BT, document_BT, mask_BT) * segment_mean(log_rho_BT, document_BT, mask_BT)
    ratio_BT = torch.exp(log_ratio(logp_BT, behavior_logp_BT)).detach()
    return -adv_BT * logp_BT + 0.5 * tau * square_BT, {"ratio": ratio_BT}


def nll(logp_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the target, in nats: the loss of supervised training."""
    return -logp_BT


def positive_nll(logp_BT: Tensor, positive_BT: Tensor) -> Tensor:
    """`nll` where `positive_BT` is True, else 0: imitation of the correct samples. VAPO, arXiv:2504.05118.

    Its denominator counts the tokens of the correct samples only.
    """
    return -blank(positive_BT, logp_BT)[0]


def value_clip(value_BT: Tensor, behavior_value_BT: Tensor, return_BT: Tensor, *, clip: float) -> tuple[Tensor, Stats]:
    """Clipped value loss of PPO: half the larger of the two squared errors; `clip` in units of the return.

    L_t = max((V - R)^2, (clip(V, V_b - clip, V_b + clip) - R)^2) / 2,  V_b the value when the rollout was scored
    """
    near_BT = behavior_value_BT + (value_BT - behavior_value_BT).clamp(-clip, clip)
    plain_BT, clipped_BT = (value_BT - return_BT).square(), (near_BT - return_BT).square()
    return 0.5 * torch.maximum(plain_BT, clipped_BT), {"value_clipped": (clipped_BT > plain_BT).float()}


def offpolicy_sequence_mask(
    logp_BT: Tensor, behavior_logp_BT: Tensor, adv_BT: Tensor, *, document_BT: Tensor, mask_BT: Tensor, limit: float
) -> Tensor:
    """False where a sequence with A < 0 has drifted: mean_t log(mu / pi) > limit nats. DeepSeek-V3.2.

    The dropped tokens stay in the denominator.
    """
    logp_BT, behavior_logp_BT, adv_BT = blank(mask_BT, logp_BT.detach(), behavior_logp_BT, adv_BT)
    return (adv_BT >= 0) | (segment_mean(behavior_logp_BT - logp_BT, document_BT, mask_BT) <= limit)


def token_covariance(logp_BT: Tensor, adv_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """cov_t = (A_t - mean A) (log pi_t - mean log pi) over the masked tokens, detached. arXiv:2505.22617."""
    logp_BT, adv_BT = blank(mask_BT, logp_BT.detach(), adv_BT)
    count = mask_BT.sum().clamp_min(1)
    return (adv_BT - adv_BT.sum() / count) * (logp_BT - logp_BT.sum() / count)


def weighted_sum(x_BT: Tensor, weight_BT: Tensor, dp_size: int) -> Tensor:
    """The step's loss from `aggregation.token_weights`, laid out as `weight_BT`, 0 where nothing is trained.

    The weights belong to the whole optimizer step, so micro-batch losses add up. The engine averages gradients over
    `dp_size` ranks; multiplying by it undoes that.
    """
    (kept_BT,) = blank(weight_BT != 0, x_BT)
    return (kept_BT * weight_BT).sum() * dp_size


def _clipped(ratio_BT: Tensor, adv_BT: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Stats]:
    """-min(ratio A, clip(ratio) A)."""
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = -torch.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT)
    return loss_BT, {"ratio": ratio_BT.detach(), "clipped": (clipped_BT * adv_BT < ratio_BT * adv_BT).float()}


def _share(mask_BT: Tensor, frac: float) -> int:
    return max(int(frac * int(mask_BT.sum())), 1)


def _largest(score_BT: Tensor, eligible_BT: Tensor, count: int) -> Tensor:
    """True at the `count` eligible positions with the largest score, or at all of them where there are fewer."""
    score = torch.where(eligible_BT, score_BT, -torch.inf).flatten()
    index = torch.topk(score, min(count, score.numel())).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill(0, index, True).view_as(eligible_BT) & eligible_BT
