"""What one step does to the probability of being correct, by what was drawn: BroRL's mass balance, arXiv:2510.01180.

Shapes: `V` the vocabulary; `E` tokens of rollouts at prefixes that those of a group share; `K` those tokens, each
counted once at its prefix; `S` the prefixes; `G` groups; `N` rollouts.

One softmax over tokens of which some are correct; N draws of it; a reward R_c for each drawn correct token, R_w for
each drawn wrong one (R_w <= 0 <= R_c), 0 for what was not drawn. A gradient step of size eta on the surrogate
`(1 / N) sum_drawn R_v p_v` changes the mass Q of the correct tokens, to first order in eta, by (Theorem 1)

    eta / N [ (R_c - S) (1 - Q) A_2  +  (S - R_w) Q B_2  +  S (Q U_wrong - (1 - Q) U_correct) ],   S = R_c P_A + R_w P_B

with P_A and A_2 the sums of p and p^2 over drawn correct tokens, P_B and B_2 over drawn wrong ones, U_correct and
U_wrong those of p^2 over what was not drawn. The first two terms are never negative. The third is what few draws cost:
with S > 0 correct tokens that were not drawn lose mass. It goes to 0 with more draws, as its expected second moment
`sum_v p_v^2 (1 - p_v)^N` does (Lemma 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """The change of the correct mass, term by term.

    >>> Terms(sampled_correct=0.03, sampled_incorrect=0.02, unsampled=-0.01, q_pos=0.5, s_r=0.1).total
    0.04
    """

    sampled_correct: float
    sampled_incorrect: float
    unsampled: float
    q_pos: float
    """Q, the mass of the correct tokens before the step."""
    s_r: float
    """S, the p-weighted reward of what was drawn."""

    @property
    def total(self) -> float:
        """The change of Q."""
        return self.sampled_correct + self.sampled_incorrect + self.unsampled


@dataclass(frozen=True, slots=True)
class Balance:
    """The mass balance of a group, over the prefixes that at least two of its judged rollouts went on from.

    >>> of_group([(5, 1), (5, 1), (6, 1)], [(-0.4, 0.0), (-0.4, 0.0), (-1.2, 0.0)], [True, True, False]).num_states
    2
    """

    terms: Terms
    """With eta / N = 1; means over the prefixes, each as often as rollouts went on from it; NaN where there is none."""
    mixed: float
    """Mean of `sum p^2 q (1 - q)`: what `terms.total` is above the change of the expected reward, see `of_group`."""
    num_states: int
    shared_frac: float
    """Share of the judged rollouts' tokens that stand at these prefixes."""


def theorem(
    p_V: Tensor, correct_V: Tensor, sampled_V: Tensor, *, r_correct: float, r_wrong: float, eta_over_n: float = 1.0
) -> Terms:
    """Theorem 1 for known probabilities: BroRL, arXiv:2510.01180. `correct_V` and `sampled_V` are True or False.

    >>> p, drawn = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([True, True, False])
    >>> theorem(p, torch.tensor([True, False, False]), drawn, r_correct=1.0, r_wrong=-1.0).unsampled
    0.0078125
    """
    p_V = p_V.double()
    (p_a, a2), (p_b, b2) = (_sums(p_V[sampled_V & side_V]) for side_V in (correct_V, ~correct_V))
    (_, u_correct), (_, u_wrong) = (_sums(p_V[~sampled_V & side_V]) for side_V in (correct_V, ~correct_V))
    q_pos = float(p_V[correct_V].sum())
    s_r = r_correct * p_a + r_wrong * p_b
    return Terms(
        sampled_correct=eta_over_n * (r_correct - s_r) * (1 - q_pos) * a2,
        sampled_incorrect=eta_over_n * (s_r - r_wrong) * q_pos * b2,
        unsampled=eta_over_n * s_r * (q_pos * u_wrong - (1 - q_pos) * u_correct),
        q_pos=q_pos,
        s_r=s_r,
    )


Answers = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]], Sequence[bool | None]]
"""Of a group: token ids, log-probs, and whether each passed."""


def of_group(
    token_ids: Sequence[Sequence[int]], logp: Sequence[Sequence[float]], passed: Sequence[bool | None]
) -> Balance:
    """An estimate of the theorem's terms from the rollouts of one prompt, with the group's mean as baseline.

    A state is a prefix that n >= 2 judged rollouts went on from. A token v there was drawn with probability p_v, and
    counts as correct with q_v, the share of the rollouts through it that passed:

        Q = mean pass of the n,  R_c = 1 - Q,  R_w = -Q,  A_2 = sum p^2 q,  B_2 = sum p^2 (1 - q),
        S = R_c sum p q + R_w sum p (1 - q),      U_correct = (1 / n) sum of p q over tokens that one rollout drew

    and U_wrong with 1 - q. As in Good and Turing's estimate of the unseen, U is unbiased for what n - 1 draws leave
    out: a rollout's token v is new to the other n - 1 with probability (1 - p_v)^(n-1), so the mean of p [new] q is
    in expectation `sum_v p_v^2 q_v (1 - p_v)^(n-1)`.

    A token that leads to both outcomes is not simply correct. To first order the step changes the state's expected
    reward by `total - mixed`, as `q (1-Q) (1-Q-S) + (1-q) Q (Q+S)` is `(q-Q) (q-Q-S) + q (1-q)`.

    A NaN in `logp`, where the policy did not write the token, ends a rollout. The cost is that of the shared tokens.
    """
    return of_groups([(token_ids, logp, passed)])[0]


def of_groups(groups: Sequence[Answers]) -> list[Balance]:
    """`of_group` of each (token_ids, logp, passed), worked out together: a step has many small ones."""
    judged = [
        (group, tuple(row), logp[i], bool(passed[i]))
        for group, (token_ids, logp, passed) in enumerate(groups)
        for i, row in enumerate(token_ids)
        if passed[i] is not None
    ]
    judged.sort(key=lambda rollout: rollout[:2])
    group_N, ids, logps, passes = zip(*judged, strict=True) if judged else ((), (), (), ())
    written = _shared_part(group_N, ids, logps)
    passed_E = torch.tensor(passes, dtype=torch.float64)[written.row_E]
    group_E = torch.tensor(group_N, dtype=torch.int64)[written.row_E]
    lengths = [0] * len(groups)
    for group, row in zip(group_N, ids, strict=True):
        lengths[group] += len(row)
    return _balances(written, passed_E, group_E, lengths)


@dataclass(frozen=True, slots=True)
class _Written:
    """Tokens that rollouts wrote, by depth and there by state and token: numbers of the rollout, state and token."""

    row_E: Tensor
    state_E: Tensor
    token_E: Tensor
    p_E: Tensor


def _shared_part(groups: Sequence[int], ids: Sequence[tuple[int, ...]], logp: Sequence[Sequence[float]]) -> _Written:
    """Each rollout up to its first token of its own. Sorted ids: two that share a prefix share it with all between.

    Rollouts of different groups do not even share the empty prefix.
    """
    rows = list(zip(groups, ids, strict=True))
    above = [-1, *(_num_shared(one[1], two[1]) if one[0] == two[0] else -1 for one, two in pairwise(rows))][: len(rows)]
    lengths = [max(0, *pair) + 1 for pair in zip(above, [*above[1:], -1], strict=False)]
    # The end of a rollout has no log-prob, but a place, so that no two below it seem to share more than they do.
    parts = [(*row[:length], math.nan)[:length] for row, length in zip(logp, lengths, strict=True)]
    row_E = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(lengths, dtype=torch.int64))
    depth_E = torch.arange(len(row_E)) - _starts(lengths)[row_E]
    logp_E = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.float64)
    logp_E = torch.where(depth_E < _first_nan(logp_E, depth_E, row_E, len(ids))[row_E], logp_E, torch.nan)
    order = torch.argsort(depth_E, stable=True)
    row_E, depth_E, logp_E = row_E[order], depth_E[order], logp_E[order]
    above_E = torch.tensor(above, dtype=torch.int64)[row_E]
    state_E, token_E = (above_E < depth_E).cumsum(0), (above_E <= depth_E).cumsum(0)
    kept_E = ~torch.isnan(logp_E)
    return _Written(row_E[kept_E], state_E[kept_E], token_E[kept_E], logp_E[kept_E].exp())


def _balances(written: _Written, passed_E: Tensor, group_E: Tensor, lengths: Sequence[int]) -> list[Balance]:
    """The means over the states of each group, whose rollouts have `lengths` tokens in all."""
    _, state_E, n_S = torch.unique_consecutive(written.state_E, return_inverse=True, return_counts=True)
    _, token_E, n_K = torch.unique_consecutive(written.token_E, return_inverse=True, return_counts=True)
    state_K = torch.zeros_like(n_K).index_copy(0, token_E, state_E)
    # The generator's log-probs of one token at one state differ by rounding.
    p_K, q_K = (_sum_at(token_E, x_E, len(n_K)) / n_K for x_E in (written.p_E, passed_E))
    q_S = _sum_at(state_E, passed_E, len(n_S)) / n_S
    square_K, unseen_K = p_K.square(), p_K * (n_K == 1) / n_S[state_K]
    (p_a, a2, u_correct), (p_b, b2, u_wrong) = (
        [_sum_at(state_K, x_K * share_K, len(n_S)) for x_K in (p_K, square_K, unseen_K)] for share_K in (q_K, 1 - q_K)
    )
    s_S = (1 - q_S) * p_a - q_S * p_b
    correct_S, incorrect_S = (1 - q_S - s_S) * (1 - q_S) * a2, (s_S + q_S) * q_S * b2
    unsampled_S = s_S * (q_S * u_wrong - (1 - q_S) * u_correct)
    mixed_S = _sum_at(state_K, square_K * q_K * (1 - q_K), len(n_S))
    weight_S = torch.where(n_S >= 2, n_S, 0)
    group_S = torch.zeros_like(n_S).index_copy(0, state_E, group_E)
    weight_G = _sum_at(group_S, weight_S.double(), len(lengths))
    means = [
        (_sum_at(group_S, x_S * weight_S, len(lengths)) / weight_G).tolist()
        for x_S in (correct_S, incorrect_S, unsampled_S, q_S, s_S, mixed_S)
    ]
    states_G = _sum_at(group_S, (weight_S > 0).long(), len(lengths))
    found = zip(zip(*means, strict=True), states_G.tolist(), weight_G.tolist(), lengths, strict=True)
    return [
        Balance(Terms(*terms), mixed, num_states=states, shared_frac=weight / length if length else math.nan)
        for (*terms, mixed), states, weight, length in found
    ]


def _num_shared(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens at the front both have."""
    alike = zip(one, two, strict=False)
    return next((t for t, (x, y) in enumerate(alike) if x != y), min(len(one), len(two)))


def _first_nan(x_E: Tensor, depth_E: Tensor, row_E: Tensor, num_rows: int) -> Tensor:
    """The depth of each row's first NaN; beyond all depths where it has none."""
    bad_E = torch.isnan(x_E)
    beyond = torch.full((num_rows,), len(x_E))
    return beyond.scatter_reduce(0, row_E[bad_E], depth_E[bad_E], "amin")


def _starts(lengths: Sequence[int]) -> Tensor:
    """Where each row begins when they lie end to end."""
    return torch.tensor([0, *accumulate(lengths)][: len(lengths)], dtype=torch.int64)


def _sum_at(place: Tensor, x: Tensor, size: int) -> Tensor:
    """Sums of the x of each place."""
    return torch.zeros(size, dtype=x.dtype).index_add(0, place, x)


def _sums(p: Tensor) -> tuple[float, float]:
    """Sum of p and of p^2."""
    return float(p.sum()), float(p.square().sum())
