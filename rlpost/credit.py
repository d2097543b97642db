"""Rewards -> advantages: what each completion token of a step is credited with, over all ranks.

`advantages.py` has the formulas; here a recipe's choice of them meets the groups. `G` rollouts of a group, `K` rewards,
`T` completion tokens of a document. Only trained tokens are credited: what the policy did not write (the run's own
words in an interrupted answer) and what could not be judged stay out of every mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlpost import advantages, lengths
from rlpost.advantages import Moments
from rlpost.algorithm_recipe import Algorithm
from rlpost.document import Document
from rlpost.kl import kl
from rlpost.plugins import bind
from rlpost.types import Group
from rlpost.world import World

WHITENED = ("reinforce_pp_baseline", "gdpo")
OF_THE_BATCH = (*WHITENED, "batch_std")
"""Advantages of whole rollouts that need the moments of the batch."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A group as an advantage sees it; a reward that could not be judged is NaN."""

    rewards_G: Tensor
    """With the length reward, and with the KL penalty where that is in the reward."""
    parts_KG: Tensor
    """Each reward before its weight, and the length reward last."""
    lengths_G: Tensor
    """Trained tokens."""
    greedy_reward: float
    baseline_N: Tensor | None = None
    """The rewards that these are compared with, where they are not their own."""

    def part(self, places: list[int], baseline_N: Tensor | None) -> Judged:
        """Some rollouts of the group."""
        rewards_G, parts_KG, lengths_G = self.rewards_G[places], self.parts_KG[:, places], self.lengths_G[places]
        return Judged(rewards_G, parts_KG, lengths_G, self.greedy_reward, baseline_N)


def credit(
    groups: Sequence[Group],
    documents: Sequence[Document],
    algorithm: Algorithm,
    weights: Mapping[str, float],
    *,
    kl_coef: float,
    world: World,
) -> list[Document]:
    """The documents, one a rollout in the order of groups, with their advantages (and returns, for a critic).

    `weights` are those of the rewards by name; every rank calls it.
    """
    penalties = [_kl_penalty(document, algorithm, kl_coef) for document in documents]
    judged = _judged(groups, documents, penalties, algorithm, list(weights))
    rewards = [float(reward) for group in judged for reward in group.rewards_G]
    use, options = algorithm.advantage["use"], _options(algorithm.advantage)
    if use == "gae":
        return _generalised(documents, rewards, penalties, algorithm, world)
    if use == "reinforce_pp":
        return _whitened_returns(documents, rewards, penalties, world)
    parts, places = _by_role(groups, judged, algorithm.off_policy.statistics)
    if use in OF_THE_BATCH:
        credited = _of_the_batch(use, parts, [*weights.values(), 1.0], options, world)
    else:
        credited = [_of_the_group(use, group, algorithm.advantage) for group in parts]
    flat = [0.0] * len(documents)
    for place, advantages_G in zip(places, credited, strict=True):
        for i, advantage in zip(place, advantages_G.tolist(), strict=True):
            flat[i] = advantage
    return [replace(document, advantage=advantage) for document, advantage in zip(documents, flat, strict=True)]


def add_length_rewards(groups: Sequence[Group], length: Mapping[str, Any], *, budget: int, step: int) -> None:
    """Set each rollout's `length_reward`; `budget` is the number of tokens that an answer may have."""
    for group in groups:
        tokens = [len(rollout.token_ids) for rollout in group.rollouts]
        correct = [bool(rollout.passed) for rollout in group.rollouts]
        for rollout, reward in zip(group.rollouts, _length_rewards(length, tokens, correct, budget, step), strict=True):
            rollout.length_reward = reward


def _length_rewards(
    length: Mapping[str, Any], tokens: list[int], correct: list[bool], budget: int, step: int
) -> list[float]:
    if length["use"] == "soft_overlong":
        buffer = max(1, round(length["buffer_frac"] * budget))
        return [length["weight"] * lengths.soft_overlong(n, limit=budget, buffer=buffer) for n in tokens]
    if length["use"] == "kimi":
        weight = lengths.warmed_up(length["weight"], step=step, warmup_steps=length["warmup_steps"])
        return [weight * reward for reward in lengths.kimi_length(tokens, correct)]
    if length["use"] == "cosine" and lengths.switched_on(step, on=length["steps_on"], off=length["steps_off"]):
        bounds = {"limit": budget, "low": length["low"], "high": length["high"]}
        return [length["weight"] * lengths.cosine_length(n, **bounds) for n in tokens]
    return [0.0] * len(tokens)


def _judged(
    groups: Sequence[Group],
    documents: Sequence[Document],
    penalties: Sequence[Tensor],
    algorithm: Algorithm,
    names: Sequence[str],
) -> list[Judged]:
    judged, start = [], 0
    for group in groups:
        stop = start + len(group.rollouts)
        rows = []
        for rollout, penalty_T in zip(group.rollouts, penalties[start:stop], strict=True):
            left_out = rollout.truncated and algorithm.truncated == "exclude"
            reward = math.nan if rollout.reward is None or left_out else rollout.reward + rollout.length_reward
            parts = [math.nan if (part := rollout.reward_parts.get(name)) is None else part for name in names]
            parts.append(rollout.length_reward)
            rows.append([reward - float(penalty_T.sum()), *(math.nan if math.isnan(reward) else x for x in parts)])
        table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names) + 2).T
        trained_G = torch.tensor([document.num_trained for document in documents[start:stop]])
        judged.append(Judged(table[0], table[1:], trained_G, group.greedy_reward))
        start = stop
    return judged


def _by_role(
    groups: Sequence[Group], judged: Sequence[Judged], statistics: str
) -> tuple[list[Judged], list[list[int]]]:
    """Whose rewards are compared: sub-groups, and the place of each of their rollouts among all of the step.

    `policy`: every sub-group but the policy's own is compared with the policy's, of which it makes no part.
    """
    parts, places, start = [], [], 0
    for group, whole in zip(groups, judged, strict=True):
        roles = [rollout.role for rollout in group.rollouts]
        for role in dict.fromkeys(["*"] if statistics == "pooled" else roles):
            own = [i for i, one in enumerate(roles) if role in ("*", one)]
            baseline = None
            if statistics == "policy" and role not in ("*", "policy") and "policy" in roles:
                baseline = whole.rewards_G[[i for i, one in enumerate(roles) if one == "policy"]]
            parts.append(whole.part(own, baseline))
            places.append([start + i for i in own])
        start += len(roles)
    return parts, places


def _of_the_group(use: str, group: Judged, chosen: Mapping[str, Any]) -> Tensor:
    """Advantages `[G]` from one group alone; `use` may be a function of a user's."""
    if use == "opo":
        return advantages.opo(group.rewards_G, group.lengths_G)
    if use == "remax":
        return advantages.remax(group.rewards_G, group.greedy_reward)
    if ":" in use:
        return bind(chosen, "advantages", where="algorithm.advantage", skip=1)(group.rewards_G).nan_to_num(0.0)
    if group.baseline_N is not None:
        return advantages.against(group.rewards_G, group.baseline_N, scale_by_std=chosen.get("scale_by_std", False))
    if use in ("grpo", "passk"):
        return getattr(advantages, use)(group.rewards_G, scale_by_std=chosen["scale_by_std"])
    return {"dr_grpo": advantages.dr_grpo, "rloo": advantages.rloo}[use](group.rewards_G)


def _of_the_batch(
    use: str, judged: Sequence[Judged], weights_K: Sequence[float], options: Mapping[str, Any], world: World
) -> list[Tensor]:
    """Advantages `[G]` of each group, by the mean and deviation of all ranks' groups."""
    if use == "gdpo":
        raw = [advantages.gdpo_sum(group.parts_KG, weights_K) for group in judged]
    else:
        raw = [advantages.mean_baseline(group.rewards_G) for group in judged]
    by_token = options.get("count") == "tokens"
    counts = [group.lengths_G if by_token else torch.ones_like(group.lengths_G) for group in judged]
    batch = _over_ranks(advantages.moments(raw, counts), world)
    return advantages.whiten(raw, batch) if use in WHITENED else advantages.scale(raw, batch)


def _whitened_returns(
    documents: Sequence[Document], rewards: Sequence[float], penalties: Sequence[Tensor], world: World
) -> list[Document]:
    """REINFORCE++: what is still to come of reward and penalty, whitened over the trained tokens of all ranks."""
    raw = [
        (reward + penalty_T.cumsum(0) - penalty_T)[_kept(document)]  # `reward` has them all off: add the earlier ones
        for document, reward, penalty_T in zip(documents, rewards, penalties, strict=True)
    ]
    return _with_advantages(documents, _whiten(raw, world))


def _generalised(
    documents: Sequence[Document],
    rewards: Sequence[float],
    penalties: Sequence[Tensor],
    algorithm: Algorithm,
    world: World,
) -> list[Document]:
    """GAE over each answer's trained tokens: the reward at the last of them, minus each token's KL penalty.

    An answer that was cut off ends there as well: what it would have earned is not bootstrapped.
    """
    how, critic = algorithm.advantage, algorithm.critic
    raw, returns = [], []
    for document, reward, penalty_T in zip(documents, rewards, penalties, strict=True):
        kept = _kept(document)
        values_T, rewards_T = document.scores["value"][kept].double(), -penalty_T[kept]
        if len(rewards_T):
            rewards_T[-1] += reward + float(penalty_T.sum())  # `reward` has the sum of the penalties taken off
        alpha = how["length_alpha"]
        lam = max(how["lam"], advantages.vapo_lambda(len(rewards_T), alpha) if alpha else 0.0)
        raw.append(advantages.gae(rewards_T, values_T, gamma=critic.gamma, lam=lam))
        returns.append(advantages.gae(rewards_T, values_T, gamma=critic.gamma, lam=critic.lam) + values_T)
    credited = _with_advantages(documents, _whiten(raw, world))
    return [
        replace(document, scores={**document.scores, "return": _spread(return_T, document)})
        for document, return_T in zip(credited, returns, strict=True)
    ]


def _kl_penalty(document: Document, algorithm: Algorithm, kl_coef: float) -> Tensor:
    """What the KL takes off each token's reward `[T]`, float64; 0 where nothing is trained."""
    nothing = torch.zeros(len(document.token_ids), dtype=torch.float64)
    if algorithm.kl.place != "reward" or "ref_logp" not in document.scores:
        return nothing
    prox_T, ref_T = document.scores["prox_logp"].double(), document.scores["ref_logp"].double()
    return torch.where(_kept(document), kl_coef * kl(algorithm.kl.estimator, prox_T, ref_T), nothing)


def _whiten(raw: list[Tensor], world: World) -> list[Tensor]:
    return advantages.whiten(raw, _over_ranks(advantages.moments(raw, map(torch.ones_like, raw)), world))


def _over_ranks(mine: Moments, world: World) -> Moments:
    return sum(world.all_gather_object(mine), advantages.no_moments())


def _with_advantages(documents: Sequence[Document], values: Sequence[Tensor]) -> list[Document]:
    return [
        replace(document, advantage=_spread(values_T, document))
        for document, values_T in zip(documents, values, strict=True)
    ]


def _spread(values: Tensor, document: Document) -> Tensor:
    """Values of the trained tokens, laid out over all completion tokens `[T]`."""
    whole_T = torch.zeros(len(document.token_ids), dtype=torch.float64)
    whole_T[_kept(document)] = values
    return whole_T


def _kept(document: Document) -> Tensor:
    return torch.tensor(document.trained, dtype=torch.bool)


def _options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if key != "use"}
