"""Advantages: what each rollout of a group is worth against the others. Pure functions on tensors; no collectives.

Shapes: `G` rollouts of one prompt; a batch is a list of such tensors, one a group, and comes back as one. A reward
that is NaN could not be judged: it stays out of every mean, deviation and count, and its advantage is 0. Rewards that
are all equal give exactly 0: they are compared themselves, because a float mean of equal numbers need not be that
number, and dividing the difference by its deviation makes it large.

A method of the batch has two halves, so that ranks can put their sums together in between:

    raw = [mean_baseline(rewards_G) for rewards_G in rewards]
    batch = total(all_gather(moments(raw, counts)))       # counts: 1 a rollout, or its number of trained tokens
    advantages = whiten(raw, batch)

    method                                            raw              finish
    REINFORCE++ (counts: tokens)                      rewards          whiten
    REINFORCE++ baseline, ProRLv2 (counts: either)    mean_baseline    whiten
    batch_std of ScaleRL (counts: rollouts)           mean_baseline    scale
    GDPO (counts: either)                             gdpo_sum         whiten
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def grpo(rewards_G: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Group-relative advantage, `A_i = (r_i - mean(r)) / (std(r) + eps)`; GRPO section 4.1.2, arXiv:2402.03300.

    `std` has the unbiased divisor G - 1. Without `scale_by_std` only the mean is taken off (Dr. GRPO,
    arXiv:2503.20783).
    """
    centred_G = mean_baseline(rewards_G).nan_to_num(0.0)
    return _over_std(centred_G, rewards_G, eps) if scale_by_std else centred_G


def dr_grpo(rewards_G: Tensor) -> Tensor:
    """`A_i = r_i - mean(r)`, to be aggregated over a constant length. arXiv:2503.20783."""
    return grpo(rewards_G, scale_by_std=False)


def rloo(rewards_G: Tensor) -> Tensor:
    """Leave-one-out, `A_i = r_i - mean_{j != i}(r_j) = n / (n - 1) (r_i - mean(r))` of n judged. arXiv:2402.14740."""
    num_judged = int((~torch.isnan(rewards_G)).sum())
    return mean_baseline(rewards_G).nan_to_num(0.0) * (num_judged / max(num_judged - 1, 1))


def remax(rewards_G: Tensor, greedy_reward: float) -> Tensor:
    """Against the reward of the greedy answer, `A_i = r_i - r_greedy`; all 0 where that is NaN. arXiv:2310.10505."""
    return (rewards_G - greedy_reward).nan_to_num(0.0)


def opo(rewards_G: Tensor, lengths_G: Tensor) -> Tensor:
    """Against the length-weighted mean, `A_i = r_i - sum(l r) / sum(l)`, lengths in tokens. arXiv:2505.23585."""
    judged_G = ~torch.isnan(rewards_G)
    if _all_equal(rewards_G[judged_G]):
        return torch.zeros_like(rewards_G)
    weight_G = lengths_G.to(rewards_G.dtype) * judged_G
    baseline = (weight_G * rewards_G.nan_to_num(0.0)).sum() / weight_G.sum()
    return (rewards_G - baseline).nan_to_num(0.0)


def passk(rewards_G: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Only the best rollout counts, by its lead: `r_max - r_second`, over the group's std if asked. arXiv:2503.19595.

    Without the std it is an unbiased gradient of the expected best of G, since the best of the others is a baseline.
    """
    advantages_G = torch.zeros_like(rewards_G)
    if int((~torch.isnan(rewards_G)).sum()) < 2:
        return advantages_G
    (best, second), (winner, _) = torch.topk(rewards_G.nan_to_num(-torch.inf), 2)
    advantages_G[winner] = best - second
    return _over_std(advantages_G, rewards_G, eps) if scale_by_std else advantages_G


def mean_baseline(rewards_G: Tensor) -> Tensor:
    """`r_i - mean(r)`, with NaN left in place for the moments of the batch to see; 0 for a lone judged reward."""
    judged = rewards_G[~torch.isnan(rewards_G)]
    if _all_equal(judged):
        return torch.where(torch.isnan(rewards_G), rewards_G, torch.zeros_like(rewards_G))
    return rewards_G - judged.mean()


def against(rewards_G: Tensor, baseline_N: Tensor, *, scale_by_std: bool = False, eps: float = 1e-6) -> Tensor:
    """`(r_i - mean(b)) / (std(b) + eps)` with the rewards b of others as the baseline; 0 where there are none.

    Without `scale_by_std`, or where all of b are equal, only the mean is taken off.
    """
    judged = baseline_N[~torch.isnan(baseline_N)]
    if not judged.numel():
        return torch.zeros_like(rewards_G)
    centred_G = (rewards_G - judged.mean()).nan_to_num(0.0)
    return _over_std(centred_G, judged, eps) if scale_by_std else centred_G


def gdpo_sum(parts_KG: Tensor, weights_K: Sequence[float]) -> Tensor:
    """Each of K rewards group-normalised on its own, then `sum_k w_k A_k`; to be whitened. GDPO, arXiv:2601.05242.

    A part that is NaN adds nothing; a rollout with no judged part is NaN.
    """
    normalised_KG = torch.stack([grpo(part_G, scale_by_std=True) for part_G in parts_KG])
    weighted_KG = normalised_KG * torch.tensor(weights_K, dtype=parts_KG.dtype, device=parts_KG.device)[:, None]
    return torch.where(torch.isnan(parts_KG).all(0), torch.nan, weighted_KG.sum(0))


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over a batch, to be added up over ranks. The extremes tell a batch of equal values, which has no scale.

    >>> whole = moments([torch.tensor([1.0, 2.0])], [torch.ones(2)]) + moments([torch.tensor([3.0])], [torch.ones(1)])
    >>> whole.mean, whole.std
    (2.0, 1.0)
    """

    count: float
    sum: float
    sum_of_squares: float
    low: float
    high: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_of_squares + other.sum_of_squares,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @property
    def mean(self) -> float:
        """Weighted mean; exactly the value where all are equal."""
        return self.low if self.low == self.high else self.sum / max(self.count, 1.0)

    @property
    def std(self) -> float:
        """Standard deviation with the unbiased divisor count - 1; 0 where all are equal."""
        if self.low >= self.high or self.count <= 1:
            return 0.0
        return (max(self.sum_of_squares - self.sum**2 / self.count, 0.0) / (self.count - 1)) ** 0.5


def moments(values: Iterable[Tensor], counts: Iterable[Tensor]) -> Moments:
    """Moments of this rank's values, each taken `counts` times; NaN and a count of 0 stay out. Sums are in float64."""
    total = no_moments()
    for values_G, counts_G in zip(values, counts, strict=True):
        kept_G = ~torch.isnan(values_G) & (counts_G > 0)
        x, n = values_G[kept_G].double(), counts_G[kept_G].double()
        if x.numel():
            sums = n.sum(), (n * x).sum(), (n * x.square()).sum(), x.min(), x.max()
            total += Moments(*(float(value) for value in sums))
    return total


def no_moments() -> Moments:
    """The moments of an empty batch: where a sum over ranks starts."""
    return Moments(0.0, 0.0, 0.0, torch.inf, -torch.inf)


def whiten(values: Sequence[Tensor], batch: Moments, *, eps: float = 1e-6) -> list[Tensor]:
    """`(x - mean) / (std + eps)` with the moments of the whole batch; NaN becomes 0."""
    return [((values_G - batch.mean) / (batch.std + eps)).nan_to_num(0.0) for values_G in values]


def scale(values: Sequence[Tensor], batch: Moments, *, eps: float = 1e-6) -> list[Tensor]:
    """`x / (std + eps)` with the standard deviation of the whole batch; NaN becomes 0."""
    return [(values_G / (batch.std + eps)).nan_to_num(0.0) for values_G in values]


def reinforce_pp(rewards: Sequence[Tensor], batch: Moments) -> list[Tensor]:
    """REINFORCE++: rewards whitened over the tokens of the batch. `batch` is of the rewards. arXiv:2501.03262."""
    return whiten(rewards, batch)


def reinforce_pp_baseline(rewards: Sequence[Tensor], batch: Moments) -> list[Tensor]:
    """Group mean taken off, then whitened over the batch. `batch` is of `mean_baseline`. arXiv:2501.03262.

    ProRLv2's decoupled normalisation. Counts of tokens let long answers weigh more (OpenRLHF); counts of 1 do not.
    """
    return whiten([mean_baseline(rewards_G) for rewards_G in rewards], batch)


def batch_std(rewards: Sequence[Tensor], batch: Moments) -> list[Tensor]:
    """Group mean taken off, divided by one standard deviation for the whole batch. ScaleRL, arXiv:2510.13786.

    `batch` is of `mean_baseline`, or of the rewards themselves as in TRL's `scale_rewards="batch"`.
    """
    return scale([mean_baseline(rewards_G) for rewards_G in rewards], batch)


def gdpo(parts: Sequence[Tensor], weights_K: Sequence[float], batch: Moments) -> list[Tensor]:
    """Several rewards `[K, G]` a group: `gdpo_sum`, whitened. `batch` is of `gdpo_sum`. arXiv:2601.05242."""
    return whiten([gdpo_sum(parts_KG, weights_K) for parts_KG in parts], batch)


def gae(rewards_T: Tensor, values_T: Tensor, *, gamma: float = 1.0, lam: float = 1.0, bootstrap: float = 0.0) -> Tensor:
    """Generalised advantage over the response tokens of one sequence, arXiv:1506.02438, eq. 16.

    `A_t = sum_l (gamma lam)^l delta_{t+l}`, `delta_t = r_t + gamma V_{t+1} - V_t`; `bootstrap` is the value after the
    last token, 0 where the answer ended. Tokens that the policy did not write are left out beforehand. Returns of a
    critic are `gae(..., lam=lambda_critic) + values_T`; at lambda 1 they are Monte-Carlo (VC-PPO's value pre-training).
    """
    advantages = [0.0] * len(rewards_T)
    after, ahead = bootstrap, 0.0
    for t, (reward, value) in reversed(list(enumerate(zip(rewards_T.tolist(), values_T.tolist(), strict=True)))):
        ahead = reward + gamma * after - value + gamma * lam * ahead
        advantages[t], after = ahead, value
    return rewards_T.new_tensor(advantages)


def vapo_lambda(length: int, alpha: float = 0.05) -> float:
    """The actor's lambda for a response of `length` tokens, `1 - 1 / (alpha length)`, 0 where short. arXiv:2504.05118.

    >>> vapo_lambda(200), vapo_lambda(10)
    (0.9, 0.0)
    """
    return max(0.0, 1.0 - 1.0 / (alpha * max(length, 1)))


def _all_equal(values: Tensor) -> bool:
    return values.numel() < 2 or bool((values == values[0]).all())


def _over_std(advantages_G: Tensor, rewards_G: Tensor, eps: float) -> Tensor:
    """Divided by the standard deviation of the group's judged rewards, unless they are all equal."""
    judged = rewards_G[~torch.isnan(rewards_G)]
    return advantages_G if _all_equal(judged) else advantages_G / (judged.std() + eps)
