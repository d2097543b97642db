"""What a run measures: every figure declared once with its unit and reduction, and the clock.

Suffixes: `B` rows of a micro-batch, `T` positions of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from rlpost.peak import Gauge, fullest

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.world import World

Reduction = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What one figure is: `mean` is weighted, `last` is a figure that is the same on every rank."""

    unit: str
    reduction: Reduction
    meaning: str


METRICS: dict[str, MetricInfo] = {
    "reward/mean": MetricInfo("reward", "mean", "weighted sum of the reward's parts, over judged rollouts"),
    "reward/std": MetricInfo("reward", "mean", "standard deviation inside a group, over groups"),
    "reward/solved_frac": MetricInfo("fraction", "mean", "rollouts with the full reward"),
    "reward/length_bonus": MetricInfo("reward", "mean", "what the algorithm added for an answer's length"),
    "reward/unjudged/*": MetricInfo("rollouts", "sum", "rollouts that this part could not judge"),
    "reward/*": MetricInfo("reward", "mean", "this part before its weight, over rollouts it could judge"),
    "groups/num": MetricInfo("groups", "sum", "groups generated"),
    "groups/trained": MetricInfo("groups", "sum", "groups that the step trains on"),
    "groups/waves": MetricInfo("waves", "last", "waves of generation in the step"),
    "groups/spread_frac": MetricInfo("fraction", "mean", "groups whose rewards are not all equal"),
    "rollouts/num": MetricInfo("rollouts", "sum", "rollouts generated"),
    "rollouts/interrupted": MetricInfo("rollouts", "sum", "rollouts whose thinking the run ended"),
    "rollouts/discarded": MetricInfo("rollouts", "sum", "rollouts generated and not trained on"),
    "rollouts/measured": MetricInfo("rollouts", "sum", "rollouts that the curriculum asked for to measure difficulty"),
    "rollouts/truncated_frac": MetricInfo("fraction", "mean", "rollouts that ran into the length limit"),
    "rollouts/length_mean": MetricInfo("tokens", "mean", "tokens of a completion"),
    "rollouts/length_max": MetricInfo("tokens", "max", "tokens of the longest completion"),
    "rollouts/pass@*": MetricInfo(
        "fraction",
        "mean",
        "unbiased pass@k without help, over prompts that got k answers",
    ),
    "explore/waves": MetricInfo("waves", "max", "waves that explorers asked for beyond the first, most of a step's"),
    "explore/rollouts": MetricInfo("rollouts", "sum", "rollouts that explorers asked for"),
    "explore/newly_solved": MetricInfo("tasks", "sum", "tasks solved without help that had failed in every try before"),
    "explore/too_long": MetricInfo("prompts", "sum", "hinted prompts or solutions that do not fit; left out, not cut"),
    "explore/leaks": MetricInfo("hints", "sum", "hints in which the answer stands"),
    "explore/missing": MetricInfo("groups", "sum", "groups whose task has no solution to show"),
    "explore/*": MetricInfo("1", "mean", "what an explorer reports of itself, over ranks"),
    "guided/num": MetricInfo("rollouts", "sum", "rollouts under a hint"),
    "guided/trained_frac": MetricInfo("fraction", "mean", "trained rollouts that the policy did not write alone"),
    "guided/copied_frac": MetricInfo("fraction", "mean", "how much of its hint an answer repeats"),
    "guided/solved_frac": MetricInfo("fraction", "mean", "rollouts under a hint that passed"),
    "guided/solved_frac/*": MetricInfo("fraction", "mean", "the same at this level of hints"),
    "guided/ratio_*": MetricInfo("ratio", "last", "quantile of policy over writer of an off-policy token"),
    "guided/ess_frac": MetricInfo("fraction", "last", "effective sample size of these ratios over their number"),
    "guided/gamma": MetricInfo("ratio", "last", "gamma of the shaped ratio, where it is a quantile"),
    "expert/num": MetricInfo("rollouts", "sum", "answers of an expert"),
    "expert/solved_frac": MetricInfo("fraction", "mean", "answers of an expert that passed"),
    "mass/*": MetricInfo(
        "1", "mean", "term of BroRL's mass balance (`mass_balance.py`), over groups; or shared states"
    ),
    "tokens/generated": MetricInfo("tokens", "sum", "completion tokens of all rollouts"),
    "tokens/measured": MetricInfo("tokens", "sum", "completion tokens of measured rollouts"),
    "tokens/discarded": MetricInfo("tokens", "sum", "completion tokens generated and not trained on"),
    "tokens/trained": MetricInfo("tokens", "sum", "tokens under the loss, each epoch counted"),
    "policy/loss": MetricInfo("nats", "mean", "loss of a trained token; here and below, of one that the policy wrote"),
    "policy/entropy": MetricInfo("nats", "mean", "entropy of the policy at a trained token"),
    "policy/ratio_mean": MetricInfo("ratio", "mean", "policy over behaviour probability of a trained token"),
    "policy/ratio_max": MetricInfo("ratio", "max", "largest policy over behaviour probability"),
    "policy/clipped_frac": MetricInfo("fraction", "mean", "trained tokens whose gradient the clip removed"),
    "policy/kl_ref": MetricInfo("nats", "mean", "estimated KL(policy || reference) of a trained token"),
    "policy/kl_coef": MetricInfo("1", "last", "coefficient of the KL in this step"),
    "policy/entropy_coef": MetricInfo("1", "last", "coefficient of the entropy bonus in this step; 0 while it is off"),
    "policy/ref_resets": MetricInfo("resets", "last", "times the reference has become a copy of the policy"),
    "policy/*": MetricInfo("1", "mean", "what the loss reports of a trained token"),
    "critic/loss": MetricInfo("reward^2", "mean", "clipped squared error of the value, halved"),
    "critic/clipped_frac": MetricInfo("fraction", "mean", "trained tokens where the clipped error is the larger"),
    "critic/value": MetricInfo("reward", "mean", "value of a trained token"),
    "critic/return": MetricInfo("reward", "mean", "what the value is fitted to"),
    "critic/error": MetricInfo("reward", "mean", "|value - return| of a trained token"),
    "critic/grad_norm": MetricInfo("norm", "mean", "norm of the critic's gradient before clipping"),
    "mismatch/*k1": MetricInfo("nats", "last", "KL(generator || trainer) of a token, estimator k1"),
    "mismatch/*k3": MetricInfo("nats", "last", "KL(generator || trainer) of a token, estimator k3"),
    "mismatch/*_frac": MetricInfo("fraction", "last", "effective sample size, or weights that are not the ratio"),
    "mismatch/*": MetricInfo("nats", "last", "|trainer - generator| log-prob before the first update, by age as well"),
    "optim/grad_norm": MetricInfo("norm", "mean", "norm of the gradient before clipping, over optimizer steps"),
    "optim/lr": MetricInfo("1", "last", "learning rate of the last optimizer step"),
    "optim/steps": MetricInfo("steps", "last", "optimizer steps since the start of the run"),
    "optim/skipped_steps": MetricInfo("steps", "last", "optimizer steps skipped for a gradient that is not finite"),
    "sync/seconds": MetricInfo("s", "max", "trainer to generator weights, slowest rank; no waking up, no canary"),
    "sync/bytes": MetricInfo("bytes", "last", "weights handed to each generator"),
    "sync/gb_per_s": MetricInfo("10^9 bytes/s", "mean", "rate of the sync, over ranks"),
    "canary/logp_diff_mean": MetricInfo("nats", "mean", "|trainer - generator| log-prob of the fixed prompt"),
    "canary/logp_diff_max": MetricInfo("nats", "max", "largest |trainer - generator| log-prob of the fixed prompt"),
    "memory/peak_gib": MetricInfo("GiB", "max", "largest memory in use in any phase since the last step, fullest rank"),
    "memory/peak_gib/*": MetricInfo("GiB", "max", "largest memory in use in this phase: a GPU's, or the process's own"),
    "curriculum/*": MetricInfo("1", "last", "what the curriculum reports of itself"),
    "time/*_s": MetricInfo("s", "mean", "seconds of the step in this phase, nested phases taken out, over ranks"),
    "eval/num": MetricInfo("problems", "sum", "held-out problems"),
    "eval/*": MetricInfo("fraction", "mean", "held-out figure: pass@k, by level, truncated, or length in tokens"),
    "sft/loss": MetricInfo("nats", "mean", "cross-entropy of a trained token"),
}
"""First match wins; `*` stands for the part of a family's name that only the run knows."""

OUTSIDE_STEP = frozenset({"setup", "sft", "evaluate", "checkpoint"})
"""Phases of the clock that belong to the run and not to its steps."""


@cache
def metric_info(name: str) -> MetricInfo:
    """The declaration of `name`.

    >>> metric_info("time/generate_s").unit
    's'
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, info in METRICS.items():
        if fnmatchcase(name, pattern):
            return info
    raise ValueError(f"metric {name!r} is not declared: give its unit, reduction and meaning in METRICS")


class Metrics:
    """Collects the figures of one step on this rank and merges them over ranks as they were declared."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._numbers: dict[str, tuple[float, float]] = {}
        self._tensors: dict[str, tuple[Tensor, Tensor]] = {}

    def mean(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add to a weighted mean: sum(w v) / sum(w)."""
        self._add(name, "mean", value * weight if weight else 0.0, weight)

    def sum(self, name: str, value: float) -> None:
        """Add to a sum over ranks."""
        self._add(name, "sum", value, 1.0)

    def max(self, name: str, value: float) -> None:
        """Raise a maximum over ranks."""
        self._add(name, "max", value, 1.0)

    def last(self, name: str, value: float) -> None:
        """Set a figure that is the same on every rank."""
        self._add(name, "last", value, 1.0)

    def add(self, name: str, value: float) -> None:
        """Add to a figure in the way in which it is declared."""
        self._add(name, metric_info(name).reduction, value, 1.0)

    def tokens(self, mask_BT: Tensor, /, **values_BT: Tensor) -> None:
        """Add per-token figures under the mask: a mean over tokens, or a maximum where one is declared.

        Nothing leaves the device before `reduce`; what stands outside the mask is never read, inf and nan included.
        """
        count = mask_BT.sum().double()
        for name, value_BT in values_BT.items():
            reduction = metric_info(name).reduction
            x_BT = value_BT.detach().double()
            if reduction == "mean":
                value = x_BT.masked_fill(~mask_BT, 0.0).sum()
            elif reduction == "max":
                value = x_BT.masked_fill(~mask_BT, -math.inf).amax()
            else:
                raise ValueError(f"metric {name!r} is declared as {reduction!r}: tokens() takes mean and max")
            if name in self._tensors:
                value_before, count_before = self._tensors[name]
                value = value + value_before if reduction == "mean" else value.maximum(value_before)
                self._tensors[name] = (value, count + count_before)
            else:
                self._tensors[name] = (value, count)

    def reduce(self) -> dict[str, float]:
        """Merge over ranks with one collective, and start the next step; a mean or maximum of nothing is left out."""
        merged: dict[str, tuple[float, float]] = {}
        for one_rank in self.world.all_gather_object(self._local()):
            for name, entry in one_rank.items():
                merged[name] = _merge(metric_info(name).reduction, merged[name], entry) if name in merged else entry
        self._numbers, self._tensors = {}, {}
        return {
            name: value / weight if metric_info(name).reduction == "mean" else value
            for name, (value, weight) in merged.items()
            if weight
        }

    def _add(self, name: str, reduction: Reduction, value: float, weight: float) -> None:
        declared = metric_info(name).reduction
        if declared != reduction:
            raise ValueError(f"metric {name!r} is declared as {declared!r} in METRICS and was logged as {reduction!r}")
        entry = (float(value), float(weight))
        # On one rank the newest `last` counts; between ranks the lowest rank's does, and they are equal.
        known = name in self._numbers and reduction != "last"
        self._numbers[name] = _merge(reduction, self._numbers[name], entry) if known else entry

    def _local(self) -> dict[str, tuple[float, float]]:
        local = dict(self._numbers)
        if not self._tensors:
            return local
        import torch

        pairs = torch.stack([torch.stack(pair) for pair in self._tensors.values()]).tolist()  # one copy off the device
        for name, (value, count) in zip(self._tensors, pairs, strict=True):
            entry = (value, count)
            local[name] = _merge(metric_info(name).reduction, local[name], entry) if name in local else entry
        return local


def _merge(reduction: Reduction, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    if reduction == "last" or not b[1]:
        return a
    if reduction == "max" and a[1]:
        largest = math.nan if math.isnan(a[0] + b[0]) else max(a[0], b[0])
        return largest, a[1] + b[1]
    return b if reduction == "max" else (a[0] + b[0], a[1] + b[1])


class Clock:
    """Wall seconds by phase: every moment belongs to exactly one phase, so that phases add up to the step.

    `with clock("generate"):` charges its block to that phase, less what nested phases take; time outside of any phase
    is `other`. On an accelerator `synchronise` waits for its queue, or one phase would pay for another's kernels.
    """

    def __init__(
        self,
        synchronise: Callable[[], Any] | None = None,
        now: Callable[[], float] = time.perf_counter,
        gauge: Gauge | None = None,
    ) -> None:
        self.gauge = gauge
        self.peak_gib: dict[str, float] = {}
        """Largest memory in use in each phase of this step so far, as the gauge says."""
        self.total_peak_gib: dict[str, float] = {}
        """The same of the run, of finished steps."""
        self.seconds: dict[str, float] = {}
        """Seconds of this step so far."""
        self.total: dict[str, float] = {}
        """Seconds of the run, of finished steps."""
        self._synchronise = synchronise
        self._now = now
        self._phases = ["other"]
        self._since = now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the block to `phase`."""
        self._charge()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()

    def lap(self) -> dict[str, float]:
        """End a step: its seconds as metrics `time/<phase>_s`, and `time/step_s` without the phases outside a step.

        Of memory, `memory/peak_gib/<phase>`, and the largest of all phases as `memory/peak_gib`.
        """
        self._charge()
        for phase, seconds in self.seconds.items():
            self.total[phase] = self.total.get(phase, 0.0) + seconds
        lap = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        lap["time/step_s"] = sum(seconds for phase, seconds in self.seconds.items() if phase not in OUTSIDE_STEP)
        self.total_peak_gib = fullest([self.total_peak_gib, self.peak_gib])
        lap |= {f"memory/peak_gib/{phase}": gib for phase, gib in self.peak_gib.items()}
        if self.peak_gib:
            lap["memory/peak_gib"] = max(self.peak_gib.values())
        self.seconds, self.peak_gib = {}, {}
        return lap

    def state_dict(self) -> dict[str, Any]:
        """The run's seconds and peaks up to the last lap."""
        return {"total": dict(self.total), "peak_gib": dict(self.total_peak_gib)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a run's earlier part."""
        self.total = dict(state["total"])
        self.total_peak_gib = dict(state["peak_gib"])

    def _charge(self) -> None:
        if self._synchronise is not None:
            self._synchronise()
        if self.gauge is not None:
            self.peak_gib = fullest([self.peak_gib, {self._phases[-1]: self.gauge()}])
        now = self._now()
        self.seconds[self._phases[-1]] = self.seconds.get(self._phases[-1], 0.0) + now - self._since
        self._since = now
