"""What a run has spent: tokens, FLOPs, device-seconds and energy by purpose, in a step and since the run began.

FLOPs are arithmetic on what was asked of the model (`flops.py`); what is as it was (sampling, AdamW, the canary, weight
sync) has no products to speak of and is left out.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rlpost.clock import Clock
from rlpost.energy import Meter
from rlpost.flops import Costs, causal_pairs, full_pairs
from rlpost.metrics import Metrics, metric_info
from rlpost.types import Micro, Request, Rollout, Sampling

if TYPE_CHECKING:
    from rlpost.engine import Engine
    from rlpost.generate.base import Generator, SyncReport, Whole

PURPOSES = ("generate", "measure", "prox", "reference", "critic", "train")
"""What a step's FLOPs are for; those of an evaluation are apart."""
COUNTED = frozenset({"tokens", "flops", "energy"})
"""Families whose figures are summed over the run, and these figures beside them:"""
COUNTED_TOO = frozenset({"rollouts/num", "rollouts/discarded", "groups/num", "groups/trained"})
TOTAL = "total/"


class Accounts:
    """One rank's ledger of a step, and the run's totals, which are the same on every rank."""

    def __init__(
        self,
        policy: Costs | None,
        critic: Costs | None,
        *,
        ranks: int,
        by_document: bool = False,
        sharing: int = 1,
        peak: float | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.costs = {"critic": critic, "policy": policy}
        self.ranks = ranks
        self.by_document = by_document
        """Whether attention is paid by document: rows elsewhere are paid with all that is masked in them."""
        self.sharing = sharing
        """Ranks that share a row, each with an equal part of its positions."""
        self.peak = peak
        """FLOP/s of a rank's device at its best, where that is known."""
        self.meter = meter or Meter({})
        self.totals: dict[str, float] = {}
        self._now: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def passed(self, purpose: str, micro: Micro, *, trained: bool = False) -> None:
        """A forward pass over a micro-batch, and where it is `trained` the backward pass too."""
        costs = self.costs["critic" if purpose == "critic" else "policy"]
        if purpose == "train":
            self._now["tokens/processed"] += micro.num_tokens / self.sharing
        if costs is None:
            return
        positions = micro.tokens_BT.numel()
        pairs = micro.num_pairs if self.by_document else positions * micro.tokens_BT.shape[-1]
        sizes = {"positions": positions, "pairs": pairs, "logits": micro.num_trained}
        spent = costs.forward(**sizes) + (costs.backward(**sizes) if trained else 0)
        self._now[f"flops/{purpose}"] += spent / self.sharing
        if trained:
            needed = {"positions": micro.num_positions, "pairs": micro.num_pairs, "logits": micro.num_trained}
            self._now["flops/needed_train"] += costs.needed(**needed) / self.sharing

    def generated(self, purpose: str, requests: Sequence[Request], rollouts: Sequence[Rollout], block: int) -> None:
        """Answers of the generator to some requests, in their order; also from a thread beside the loop."""
        with self._lock:
            self._generated(purpose, requests, rollouts, block)

    def _generated(self, purpose: str, requests: Sequence[Request], rollouts: Sequence[Rollout], block: int) -> None:
        answers, costs = iter(rollouts), self.costs["policy"]
        for request in requests:
            completions = [len(next(answers).token_ids) for _ in range(request.n)]
            prompt = len(request.prompt_ids)
            if purpose == "evaluate":
                self._now["tokens/evaluated"] += sum(completions)
            else:
                self._now["tokens/prompt"] += prompt - request.known
            if costs is None or not completions:
                continue
            sizes = {"prompt": prompt, "known": request.known}
            needed = costs.generation(**sizes, completions=completions, block=1)
            if block:
                spent = costs.generation(**sizes, completions=completions, block=block)
            else:  # plain transformers: rows go on until the longest has ended; of prompts all logits and all pairs
                spent = costs.generation(prompt=prompt, completions=[max(completions)] * request.n, block=0)
                masked = full_pairs([prompt]) - causal_pairs([prompt])
                spent += request.n * costs.forward(positions=0, pairs=masked, logits=prompt - 1)
            self._now[f"flops/{purpose}"] += spent
            if purpose == "generate":
                self._now["flops/needed_generate"] += needed

    def log(self, metrics: Metrics) -> None:
        """Hand this rank's ledger to the step's figures, and begin the next."""
        for name, amount in self.take().items():
            metrics.sum(name, amount)
        for name, joules in self.meter().items():
            metrics.sum(f"energy/{name}_j", joules)

    def close_evaluation(self, every_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Add what every rank's evaluation took; that and the totals after it, to stand beside its figures."""
        spent: dict[str, float] = {}
        for ledger in every_rank:
            self._add(ledger)
            for name, amount in ledger.items():
                spent[name] = spent.get(name, 0.0) + amount
        return spent | self.shown()

    def take(self) -> dict[str, float]:
        """This rank's ledger, which begins anew."""
        with self._lock:
            ledger = dict(self._now)
            self._now.clear()
        return ledger

    def close_step(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Add a step's figures, merged over ranks, to the totals; what follows from them, and the totals."""
        found: dict[str, float] = {}
        if self.costs["policy"] is not None:
            found["flops/total"] = sum(figures.get(f"flops/{purpose}", 0.0) for purpose in PURPOSES)
            processed = figures.get("tokens/processed", 0.0)
            found["flops/six_nt"] = 6 * self.costs["policy"].non_embedding * processed
        self._add({**figures, **found})
        for name, seconds in figures.items():
            if name.startswith("time/") and name != "time/step_s":
                of_phase = f"device_s/{name.removeprefix('time/').removesuffix('_s')}"
                for key in ("device_s", of_phase):
                    self.totals[key] = self.totals.get(key, 0.0) + seconds * self.ranks
        return found | self._utilisation(figures) | self.shown()

    def shown(self) -> dict[str, float]:
        """The totals as figures."""
        return {TOTAL + name: amount for name, amount in self.totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """The totals; a ledger is empty between steps."""
        return {"totals": dict(self.totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a run's earlier part."""
        self.totals = dict(state["totals"])
        self._now.clear()
        self.meter()

    def _add(self, figures: Mapping[str, float]) -> None:
        for name, amount in figures.items():
            if name.partition("/")[0] in COUNTED or name in COUNTED_TOO:
                metric_info(TOTAL + name)
                self.totals[name] = self.totals.get(name, 0.0) + amount

    def _utilisation(self, figures: Mapping[str, float]) -> dict[str, float]:
        if self.peak is None:
            return {}
        found = {}
        for phase in ("train", "generate"):
            seconds = figures.get(f"time/{phase}_s", 0.0)
            if seconds and (needed := figures.get(f"flops/needed_{phase}")) is not None:
                found[f"mfu/{phase}"] = needed / (self.peak * self.ranks * seconds)
        return found


class Counted:
    """A generator whose answers are written into the ledger, under the purpose that the clock's phase names."""

    def __init__(self, generator: Generator, accounts: Accounts, clock: Clock) -> None:
        self.generator, self.accounts, self.clock = generator, accounts, clock

    @property
    def concurrent(self) -> bool:
        """Of the generator itself."""
        return self.generator.concurrent

    @property
    def report(self) -> SyncReport:
        """What the last weight sync moved."""
        return self.generator.report

    @property
    def prompt_block(self) -> int:
        """Of the generator itself."""
        return self.generator.prompt_block

    def generate(self, requests: Sequence[Request], sampling: Sampling, whole: Whole | None = None) -> list[Rollout]:
        """All rollouts of all requests."""
        rollouts = self.generator.generate(requests, sampling, whole)
        ahead = threading.current_thread() is not threading.main_thread()  # while the clock shows something else
        purpose = "generate" if ahead else self.clock.phase
        self.accounts.generated(purpose, requests, rollouts, self.prompt_block)
        return rollouts

    def awake(self, engine: Engine, version: int) -> AbstractContextManager[None]:
        """Push the engine's weights and let the body generate."""
        return self.generator.awake(engine, version)

    def close(self) -> None:
        """End the generator."""
        self.generator.close()
