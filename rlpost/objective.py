"""The loss of a micro-batch as the recipe's `algorithm` has it, and the coefficients that move while a run goes on.

The formulas stand in `losses.py`, `kl.py`, `mismatch.py` and `entropy.py`; this file puts the chosen ones together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rlpost import entropy, losses, mismatch
from rlpost.algorithm_recipe import Algorithm
from rlpost.algorithms import GIVEN_TO_LOSSES, LOSSES
from rlpost.document import Document
from rlpost.kl import adapted_coef, corrected_k3, kl
from rlpost.masked import blank
from rlpost.plugins import bind, resolve
from rlpost.reference import Reason, ResetRule, ResetState, advance, observe_validation
from rlpost.types import Micro
from rlpost.world import World

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Micro], tuple[Tensor, losses.Stats]]
STATS = {"ratio": ("policy/ratio_mean", "policy/ratio_max"), "clipped": ("policy/clipped_frac",)}
"""Figures of a loss that have a name of their own; any other is `policy/<its name>`."""
LEAST_GAMMA = 1e-4
MISMATCH_TOKENS = 1 << 20
"""Trained tokens of a rank that the mismatch of a step is measured on, evenly spaced; quantiles need them together."""


class Objective:
    """What a recipe's algorithm asks of each micro-batch, and what it remembers between steps."""

    def __init__(self, algorithm: Algorithm, world: World) -> None:
        self.algorithm, self.world = algorithm, world
        self.loss = bind_loss(algorithm.loss)
        self.off_policy_loss = bind_off_policy(algorithm, gamma=None)
        self.gamma: float | None = None
        """Of the shaped ratio in this step, where it is a quantile."""
        self.corrections = [_bind_correction(one) for one in algorithm.mismatch.weights]
        self.kl_coef, self.entropy_coef = algorithm.kl.coef, algorithm.entropy.coef
        self.last_entropy = math.inf
        """Mean of the step before, which says whether a steered bonus applies."""
        self.resets = ResetState()
        self.num_resets = 0
        self.entropy_threshold = -math.inf
        """Of this step: tokens below it have no policy gradient."""
        self.seen: list[Tensor] = []
        """(log rho, weight, age) `[3, N]` of this step's trained tokens."""
        self.seen_off_policy: list[Tensor] = []
        """log(policy / writer) `[N]` of this step's off-policy tokens, before the first update."""

    @property
    def needs_prox(self) -> bool:
        """Whether the policy must score the rollouts before the first update. A single update can use its own pass."""
        several = self.algorithm.minibatches * self.algorithm.epochs > 1
        decoupled = self.algorithm.mismatch.mode == "decoupled" and several
        in_reward = self.algorithm.kl.coef > 0 and self.algorithm.kl.place == "reward"
        off_policy = self.algorithm.off_policy.behavior == "plain" or self.gamma_quantile > 0
        return decoupled or in_reward or off_policy or self.algorithm.entropy.top_frac < 1

    @property
    def gamma_quantile(self) -> float:
        """Of the step's off-policy ratios, which shapes them; 0: a constant does."""
        return float(self.algorithm.off_policy.loss.get("quantile", 0.0))

    def begin(self, documents: Sequence[Document]) -> None:
        """Look at the step's documents, of all ranks, before the first update."""
        self.seen, self.seen_off_policy = [], []
        documents = [document for document in documents if document.inclusion]
        if self.gamma_quantile:
            self._shape(documents)
        if self.algorithm.entropy.top_frac == 1:
            return
        mine = [document.scores["entropy"][torch.tensor(document.trained)] for document in documents]
        every_rank = self.world.all_gather_object(torch.cat([torch.zeros(0), *mine]))
        entropy_N = torch.cat(every_rank)
        self.entropy_threshold = -math.inf
        if len(entropy_N):
            self.entropy_threshold = entropy.entropy_threshold(entropy_N, frac=self.algorithm.entropy.top_frac)

    def policy_loss(
        self, micro: Micro, logp_BT: Tensor, entropy_BT: Tensor, *, version: int, measured: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's loss, and per-token figures.

        `version` is the policy's before the step's first update; `measured`: no update lies between it and `logp_BT`,
        or `prox_logp` is there, so that the mismatch with the generator can be told from the policy's own change.
        """
        algorithm, mask_BT = self.algorithm, micro.mask_BT
        logp_BT, entropy_BT = blank(mask_BT, logp_BT, entropy_BT)
        behavior_BT, prox_BT = micro.behavior_logp_BT, micro.scores.get("prox_logp", logp_BT.detach())
        decoupled = algorithm.mismatch.mode == "decoupled"
        pg_BT, stats = self.loss(logp_BT, prox_BT if decoupled else behavior_BT, micro.adv_BT, micro)
        if micro.has_off_policy:
            off_BT, _ = self.off_policy_loss(logp_BT, behavior_BT, micro.adv_BT, micro)
            pg_BT = torch.where(micro.off_policy_BT, off_BT, pg_BT)
        weight_BT = self._correction(prox_BT, micro)
        if measured:
            self._remember(prox_BT, weight_BT if self.corrections else None, micro, version)
        loss_BT = pg_BT * weight_BT * self._kept(micro, logp_BT)
        logged = {name: x_BT for key, x_BT in stats.items() for name in STATS.get(key, (f"policy/{key}",))}
        if "ref_logp" in micro.scores:
            kl_BT = self._kl(logp_BT, micro)
            logged["policy/kl_ref"] = kl_BT
            if algorithm.kl.place == "loss":
                loss_BT = loss_BT + self.kl_coef * kl_BT
        if self.bonus:
            loss_BT = loss_BT + entropy.entropy_bonus(entropy_BT, coef=self.bonus)
        logged |= {"policy/loss": loss_BT, "policy/entropy": entropy_BT}
        loss = losses.weighted_sum(loss_BT, micro.weight_BT, self.world.size)
        if algorithm.imitation_coef:
            nll_BT = losses.positive_nll(logp_BT, micro.imitation_weight_BT > 0)
            imitated = losses.weighted_sum(nll_BT, micro.imitation_weight_BT, self.world.size)
            loss = loss + algorithm.imitation_coef * imitated
        return loss, logged

    def value_loss(self, micro: Micro, value_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's share of the step's loss, and per-token figures."""
        scored_BT, return_BT = micro.scores["value"], micro.scores["return"]
        (value_BT,) = blank(micro.mask_BT, value_BT)
        loss_BT, stats = losses.value_clip(value_BT, scored_BT, return_BT, clip=self.algorithm.critic.value_clip)
        logged = {
            "critic/loss": loss_BT,
            "critic/clipped_frac": stats["value_clipped"],
            "critic/value": value_BT,
            "critic/return": return_BT,
            "critic/error": (value_BT - return_BT).abs(),
        }
        return losses.weighted_sum(loss_BT, micro.weight_BT, self.world.size), logged

    @property
    def bonus(self) -> float:
        """The coefficient of the entropy bonus as it applies in this step."""
        target = self.algorithm.entropy.target
        return self.entropy_coef if target is None or self.last_entropy <= target else 0.0

    def mismatch_figures(self) -> dict[str, float]:
        """What generator and trainer disagreed on in this step, over all ranks, whole and by age in versions."""
        mine = torch.cat([torch.zeros(3, 0), *self.seen], dim=1)
        stride = max(1, math.ceil(mine.shape[1] / MISMATCH_TOKENS))
        whole = torch.cat(self.world.all_gather_object(mine[:, ::stride].contiguous()), dim=1)
        log_rho_N, weight_N, age_N = whole
        figures = {f"mismatch/{name}": x for name, x in mismatch.mismatch_summary(log_rho_N, weight_N).items()}
        for age, summary in mismatch.mismatch_by_age(log_rho_N, weight_N, age_N).items():
            figures |= {f"mismatch/age_{age}/{name}": x for name, x in summary.items()}
        mine = torch.cat([torch.zeros(0), *self.seen_off_policy])
        helped_N = torch.cat(self.world.all_gather_object(mine[:: max(1, len(mine) // MISMATCH_TOKENS)].contiguous()))
        return figures | {f"guided/{name}": x for name, x in mismatch.ratio_summary(helped_N).items()}

    def _shape(self, documents: Sequence[Document]) -> None:
        """Set gamma to the quantile of all ranks' off-policy ratios before the step's first update, at least 1e-4.

        Guide, arXiv:2506.13923, takes it of each micro-batch; of the step, it does not depend on how that is split.
        """
        mine = [
            (one.scores["prox_logp"] - torch.tensor(one.behavior_logp))[torch.tensor(one.trained)]
            for one in documents
            if one.off_policy
        ]
        log_rho_N = torch.cat(self.world.all_gather_object(torch.cat([torch.zeros(0), *mine])))
        if len(log_rho_N):
            limit = losses.LOG_RATIO_LIMIT
            gamma = math.exp(mismatch.quantile(log_rho_N.clamp(-limit, limit), self.gamma_quantile))
            self.gamma = max(gamma, LEAST_GAMMA)
            self.off_policy_loss = bind_off_policy(self.algorithm, gamma=self.gamma)

    def after_step(self, step: int, figures: Mapping[str, float]) -> Reason | None:
        """Move the steered coefficients by the figures of a whole step; why the reference is to be reset, or None."""
        algorithm, kl_mean = self.algorithm, figures.get("policy/kl_ref")
        rule, how = algorithm.kl, algorithm.entropy
        if rule.target is not None and kl_mean is not None:
            num_samples = int(figures["rollouts/num"])
            self.kl_coef = adapted_coef(
                self.kl_coef, kl_mean, target=rule.target, horizon=rule.horizon, num_samples=num_samples
            )
        mean = figures.get("policy/entropy")
        if how.target is not None and mean is not None:
            self.entropy_coef = entropy.adapted_entropy_coef(
                self.entropy_coef, mean, target=how.target, delta=how.delta, low=how.low, high=how.high
            )
            self.last_entropy = mean
        asked = asdict(rule.reset)
        del asked["clear_optimizer"]
        self.resets, reason = advance(ResetRule(**asked), self.resets, step=step + 1, kl_mean=kl_mean or 0.0)
        self.num_resets += reason is not None
        return reason

    def after_evaluation(self, score: float) -> None:
        """Take note of a held-out score, for resets when it stalls."""
        self.resets = observe_validation(self.resets, score)

    def figures(self) -> dict[str, float]:
        """The coefficients of this step, where they are in use."""
        shown: dict[str, float] = {}
        if self.algorithm.kl.coef:
            shown |= {"policy/kl_coef": self.kl_coef, "policy/ref_resets": float(self.num_resets)}
        if self.algorithm.entropy.coef or self.algorithm.entropy.target is not None:
            shown["policy/entropy_coef"] = self.bonus
        if self.gamma is not None:
            shown["guided/gamma"] = self.gamma
        return shown

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes between steps."""
        return {
            "kl_coef": self.kl_coef,
            "entropy_coef": self.entropy_coef,
            "last_entropy": self.last_entropy,
            "resets": asdict(self.resets),
            "num_resets": self.num_resets,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.kl_coef, self.entropy_coef = state["kl_coef"], state["entropy_coef"]
        self.last_entropy, self.num_resets = state["last_entropy"], state["num_resets"]
        self.resets = ResetState(**state["resets"])

    def _correction(self, prox_BT: Tensor, micro: Micro) -> Tensor:
        """Of tokens that the policy wrote: with the others the ratio of their own loss has it all."""
        weight_BT = torch.ones_like(prox_BT)
        for correct in self.corrections:
            weight_BT = weight_BT * correct(prox_BT, micro)
        return weight_BT.masked_fill(micro.off_policy_BT, 1.0)

    def _kept(self, micro: Micro, logp_BT: Tensor) -> Tensor:
        """False where the policy gradient is left out, though the token stays in the denominator."""
        kept_BT, limit = micro.mask_BT, self.algorithm.mismatch.offpolicy_limit
        if limit is not None:
            where = {"document_BT": micro.document_BT, "mask_BT": micro.mask_BT}
            behavior_BT, adv_BT = micro.behavior_logp_BT, micro.adv_BT
            drifted_BT = ~losses.offpolicy_sequence_mask(logp_BT, behavior_BT, adv_BT, limit=limit, **where)
            kept_BT = kept_BT & (~drifted_BT | micro.off_policy_BT)
        if self.algorithm.entropy.top_frac < 1:
            entropy_BT = micro.scores["entropy"]
            top_BT = entropy.top_entropy_mask(entropy_BT, micro.mask_BT, threshold=self.entropy_threshold)
            kept_BT = kept_BT & top_BT
        return kept_BT

    def _kl(self, logp_BT: Tensor, micro: Micro) -> Tensor:
        if self.algorithm.kl.estimator == "corrected_k3":
            return corrected_k3(logp_BT, micro.behavior_logp_BT, micro.scores["ref_logp"])
        return kl(self.algorithm.kl.estimator, logp_BT, micro.scores["ref_logp"])

    def _remember(self, prox_BT: Tensor, weight_BT: Tensor | None, micro: Micro, version: int) -> None:
        log_rho_BT = (prox_BT - micro.behavior_logp_BT).float()
        if micro.has_off_policy:
            self.seen_off_policy.append(log_rho_BT[micro.mask_BT & micro.off_policy_BT].cpu())
        mask_BT = micro.mask_BT & ~micro.off_policy_BT
        log_rho_N = log_rho_BT[mask_BT]
        limit = losses.LOG_RATIO_LIMIT
        weight_N = log_rho_N.clamp(-limit, limit).exp() if weight_BT is None else weight_BT[mask_BT].float()
        age_N = (version - micro.version_BT[mask_BT]).float()
        self.seen.append(torch.stack([log_rho_N, weight_N, age_N]).cpu())


def bind_loss(chosen: Mapping[str, Any]) -> PolicyLoss:
    """The recipe's policy loss with its parameters; of `GIVEN_TO_LOSSES` it is handed what its signature has."""
    path = f"rlpost.losses:{chosen['use']}" if chosen["use"] in LOSSES else chosen["use"]
    takes = GIVEN_TO_LOSSES & set(inspect.signature(resolve(path, "rlpost")).parameters)
    bound = bind({**chosen, "use": path}, "rlpost", where="algorithm.loss", skip=3, supplied=takes)

    def loss(logp_BT: Tensor, behavior_BT: Tensor, adv_BT: Tensor, micro: Micro) -> tuple[Tensor, losses.Stats]:
        given = {"document_BT": micro.document_BT, "mask_BT": micro.mask_BT, "draw_BT": torch.rand_like(logp_BT)}
        return bound(logp_BT, behavior_BT, adv_BT, **{name: given[name] for name in takes})

    return loss


def bind_off_policy(algorithm: Algorithm, *, gamma: float | None) -> PolicyLoss:
    """The loss of off-policy tokens; `gamma` replaces the recipe's."""
    chosen = {name: value for name, value in algorithm.off_policy.loss.items() if name != "quantile"}
    if chosen["use"] == "same":
        return bind_loss(algorithm.loss)
    return bind_loss(chosen if gamma is None else {**chosen, "gamma": gamma})


def _bind_correction(chosen: Mapping[str, Any]) -> Callable[[Tensor, Micro], Tensor]:
    weigh = getattr(mismatch, chosen["use"])
    options = {key: value for key, value in chosen.items() if key != "use"}
    by_document = "document_BT" in inspect.signature(weigh).parameters

    def correct(prox_BT: Tensor, micro: Micro) -> Tensor:
        where = {"document_BT": micro.document_BT} if by_document else {}
        return weigh(prox_BT, micro.behavior_logp_BT, mask_BT=micro.mask_BT, **where, **options)

    return correct
