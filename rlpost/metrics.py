"""What a run measures: every figure declared once with its unit and reduction.

Suffixes: `B` rows of a micro-batch, `T` positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from statistics import pstdev
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.world import World

Reduction = Literal["mean", "sum", "max", "last", "std", "quantile"]
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What one figure is: `mean` is weighted, `last` is a figure that is the same on every rank.

    `std` and `quantile` are of the values of all ranks together.
    """

    unit: str
    reduction: Reduction
    meaning: str
    source: str = ""
    """The paper, with its equation, that the figure comes from."""


METRICS: dict[str, MetricInfo] = {
    "reward/mean": MetricInfo("reward", "mean", "weighted sum of the reward's parts, over judged rollouts"),
    "reward/std": MetricInfo("reward", "mean", "standard deviation inside a group, over groups"),
    "reward/std_all": MetricInfo("reward", "std", "standard deviation over all judged rollouts of the step"),
    "reward/solved_frac": MetricInfo("fraction", "mean", "rollouts with the full reward"),
    "reward/length_bonus": MetricInfo("reward", "mean", "what the algorithm added for an answer's length"),
    "reward/unjudged/*": MetricInfo("rollouts", "sum", "rollouts that this part could not judge"),
    "reward/endings/*": MetricInfo(
        "rollouts", "sum", "rollouts by reward and how it ended: ok wrong unparsable timeout crash error"
    ),
    "reward/latency/*": MetricInfo("s", "quantile", "time that this reward took for a rollout, at most, of this share"),
    "reward/*": MetricInfo(
        "reward", "mean", "this part before its weight, over rollouts it could judge, or a figure of its own"
    ),
    "groups/num": MetricInfo("groups", "sum", "groups generated"),
    "groups/trained": MetricInfo("groups", "sum", "groups that the step trains on"),
    "groups/missing": MetricInfo("groups", "last", "groups that a step wanted and no wave of it found"),
    "groups/waves": MetricInfo("waves", "last", "waves of generation in the step"),
    "groups/spread_frac": MetricInfo("fraction", "mean", "groups whose rewards are not all equal"),
    "groups/all_solved_frac": MetricInfo("fraction", "mean", "groups without spread in which every answer passed"),
    "groups/none_solved_frac": MetricInfo("fraction", "mean", "groups without spread in which no answer passed"),
    "pipeline/waiting": MetricInfo("groups", "sum", "groups on their way to later steps"),
    "pipeline/held": MetricInfo("groups", "sum", "groups with answers that are to be continued", "arXiv:2501.12599"),
    "pipeline/age_mean": MetricInfo("steps", "mean", "steps between the beginning of a group and its training"),
    "pipeline/age_max": MetricInfo("steps", "max", "the same of the oldest group"),
    "pipeline/length_early": MetricInfo("tokens", "mean", "answer that is trained before its last moment"),
    "pipeline/length_due": MetricInfo("tokens", "mean", "answer that is trained at its last moment"),
    "pipeline/length_bias": MetricInfo(
        "tokens", "last", "length_early - length_due: below 0, short answers are fresher"
    ),
    "pipeline/several_versions_frac": MetricInfo("fraction", "mean", "answers that several policy versions wrote"),
    "rollouts/num": MetricInfo("rollouts", "sum", "rollouts generated"),
    "rollouts/interrupted": MetricInfo("rollouts", "sum", "rollouts whose thinking the run ended"),
    "rollouts/discarded": MetricInfo("rollouts", "sum", "rollouts generated and not trained on"),
    "rollouts/measured": MetricInfo("rollouts", "sum", "rollouts that the curriculum asked for to measure difficulty"),
    "rollouts/truncated_frac": MetricInfo("fraction", "mean", "rollouts that ran into the length limit"),
    "rollouts/length_mean": MetricInfo("tokens", "mean", "tokens of a completion, a tool's among them"),
    "rollouts/length_max": MetricInfo("tokens", "max", "tokens of the longest completion"),
    "rollouts/length_p*": MetricInfo("tokens", "quantile", "completion that this share of all is no longer than"),
    "rollouts/loss": MetricInfo("fraction", "last", "1 - pass@1 of the training prompts", "arXiv:2509.25300"),
    "rollouts/pass@*": MetricInfo(
        "fraction", "mean", "unbiased pass@k without help, over prompts that got k answers", "arXiv:2107.03374, eq. 1"
    ),
    "tools/turns": MetricInfo("turns", "mean", "calls of the generator for a rollout that a function leads"),
    "tools/calls": MetricInfo("calls", "mean", "tool outputs in such a rollout"),
    "tools/errors": MetricInfo("calls", "mean", "of those: outputs by which the function says that the tool failed"),
    "tools/length": MetricInfo(
        "tokens", "mean", "tokens of a completion that tools wrote, on which nothing is trained"
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
        "1",
        "mean",
        "term of BroRL's mass balance (`mass_balance.py`), over groups; or shared states",
        "arXiv:2510.01180, theorem 1",
    ),
    "synth/seeds": MetricInfo("tasks", "sum", "tasks that the policy failed, from which new problems were made"),
    "synth/diversity": MetricInfo("fraction", "last", "1 - Jaccard similarity to the nearest other new problem, mean"),
    "synth/share": MetricInfo("fraction", "last", "synthetic tasks of the pool"),
    "synth/measured": MetricInfo("problems", "sum", "new problems that the policy answered"),
    "synth/sometimes_solved": MetricInfo("problems", "sum", "of those: solved by some answers and not by all"),
    "synth/added": MetricInfo("problems", "sum", "problems that joined the tasks"),
    "synth/*": MetricInfo("problems", "sum", "problems that came through this stage of synthesis"),
    "capability/revisited": MetricInfo("tasks", "sum", "tasks of the step that had been tried in an earlier one"),
    "capability/gain": MetricInfo("fraction", "mean", "over those: pass rate now of tasks never solved before, else 0"),
    "capability/sharpening": MetricInfo(
        "fraction", "mean", "over those: change of the pass rate of tasks solved before, else 0"
    ),
    "capability/lost_frac": MetricInfo("fraction", "mean", "of those: solved before, and failed in every try now"),
    "capability/ever_solved_frac": MetricInfo("fraction", "mean", "of all tasks tried so far"),
    "capability/concentration": MetricInfo(
        "fraction", "last", "pass@1 / pass@k, k the largest: 1 where what can be solved is always solved"
    ),
    "law/slope": MetricInfo(
        "1", "last", "a of pass@1 = b - a exp(entropy), least squares over the run's steps", "arXiv:2505.22617"
    ),
    "law/intercept": MetricInfo("fraction", "last", "b of it", "arXiv:2505.22617"),
    "law/ceiling": MetricInfo("fraction", "last", "b - a: pass@1 once no entropy is left", "arXiv:2505.22617"),
    "law/r2": MetricInfo("fraction", "last", "share of the variance of pass@1 that the law explains"),
    "tokens/prompt": MetricInfo(
        "tokens", "sum", "prompts given to the generator, once for all answers of a request; and what tools wrote"
    ),
    "tokens/generated": MetricInfo("tokens", "sum", "completion tokens of all rollouts that the policy wrote"),
    "tokens/measured": MetricInfo("tokens", "sum", "completion tokens of measured rollouts"),
    "tokens/discarded": MetricInfo("tokens", "sum", "completion tokens generated and not trained on"),
    "tokens/trained": MetricInfo("tokens", "sum", "tokens under the loss, each epoch counted"),
    "tokens/processed": MetricInfo(
        "tokens", "sum", "prompt and completion tokens of what is trained, each epoch counted", "arXiv:2509.25300: T"
    ),
    "tokens/evaluated": MetricInfo("tokens", "sum", "completion tokens of a held-out evaluation"),
    "flops/generate": MetricInfo(
        "FLOPs", "sum", "rollouts: prompts found in the cache are not counted again; no drafts of speculative decoding"
    ),
    "flops/measure": MetricInfo("FLOPs", "sum", "answers that the curriculum asked for"),
    "flops/evaluate": MetricInfo("FLOPs", "sum", "answers of a held-out evaluation"),
    "flops/prox": MetricInfo("FLOPs", "sum", "the policy's log-probs before the step's first update"),
    "flops/reference": MetricInfo("FLOPs", "sum", "the reference's log-probs"),
    "flops/critic": MetricInfo("FLOPs", "sum", "the critic's values and its training"),
    "flops/train": MetricInfo("FLOPs", "sum", "the policy's training as it runs: masked pairs, what is computed twice"),
    "flops/total": MetricInfo("FLOPs", "last", "all of the step; what is not a matrix product is not counted"),
    "flops/needed_*": MetricInfo(
        "FLOPs", "sum", "training, generation: no masked pairs, nothing twice", "PaLM, arXiv:2204.02311, appendix B"
    ),
    "flops/six_nt": MetricInfo(
        "FLOPs", "last", "6 x parameters without embedding x tokens/processed", "arXiv:2509.25300"
    ),
    "mfu/*": MetricInfo(
        "fraction", "last", "needed FLOPs of the phase over peak x seconds", "PaLM, arXiv:2204.02311, appendix B"
    ),
    "energy/*_j": MetricInfo("J", "sum", "what GPUs (NVML) or processors (RAPL) took since the step before"),
    "total/tokens/*": MetricInfo("tokens", "last", "since the run began; as of each of the following"),
    "total/flops/*": MetricInfo("FLOPs", "last", "since the run began"),
    "total/energy/*": MetricInfo("J", "last", "since the run began"),
    "total/rollouts/*": MetricInfo("rollouts", "last", "since the run began"),
    "total/groups/*": MetricInfo("groups", "last", "since the run began"),
    "total/device_s*": MetricInfo("s", "last", "seconds x ranks since the run began, in all and by phase"),
    "policy/loss": MetricInfo("nats", "mean", "loss of a trained token; here and below, of one that the policy wrote"),
    "policy/entropy": MetricInfo("nats", "mean", "entropy of the policy at a trained token"),
    "policy/ratio_mean": MetricInfo("ratio", "mean", "policy over behaviour probability of a trained token"),
    "policy/ratio_max": MetricInfo("ratio", "max", "largest policy over behaviour probability"),
    "policy/clipped_frac": MetricInfo("fraction", "mean", "trained tokens whose gradient the clip removed"),
    "policy/kl_ref": MetricInfo("nats", "mean", "estimated KL(policy || reference) of a trained token"),
    "policy/kl_start": MetricInfo("nats", "last", "the same to the policy of the start, while that is the reference"),
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
    "noise/prompts": MetricInfo("prompts", "last", "in the optimizer step that was measured, over all ranks"),
    "noise/grad_sq": MetricInfo(
        "norm^2", "last", "unbiased |G|^2 of the true gradient; may be negative", "arXiv:1812.06162, appendix A"
    ),
    "noise/trace": MetricInfo(
        "norm^2", "last", "unbiased trace of the covariance of a prompt's gradient", "arXiv:1812.06162, appendix A"
    ),
    "noise/scale": MetricInfo(
        "prompts", "last", "gradient noise scale: ratio of moving means of the two", "arXiv:1812.06162, section 2"
    ),
    "noise/scale_rollouts": MetricInfo("rollouts", "last", "the same in rollouts of groups of this size"),
    "noise/step_frac": MetricInfo(
        "fraction", "last", "1 / (1 + scale / prompts): of the best step's progress", "arXiv:1812.06162, section 2"
    ),
    "optim/lr": MetricInfo("1", "last", "learning rate of the last optimizer step"),
    "optim/skipped_steps": MetricInfo("steps", "last", "optimizer steps without effect: a gradient was not finite"),
    "optim/steps": MetricInfo("steps", "last", "optimizer steps since the start of the run"),
    "sync/seconds": MetricInfo("s", "max", "trainer to generator weights, slowest rank; no waking up, no canary"),
    "sync/bytes": MetricInfo("bytes", "last", "weights handed to each generator"),
    "sync/gb_per_s": MetricInfo("10^9 bytes/s", "mean", "rate of the sync, over ranks"),
    "canary/logp_diff_mean": MetricInfo("nats", "mean", "|trainer - generator| log-prob of the fixed prompt"),
    "canary/logp_diff_max": MetricInfo("nats", "max", "largest |trainer - generator| log-prob of the fixed prompt"),
    "servers/alive": MetricInfo("servers", "sum", "generator servers that had the step's weights when they were given"),
    "servers/resent": MetricInfo("rollouts", "sum", "asked of another server since the last weights: one was lost"),
    "servers/update_s": MetricInfo(
        "s", "max", "a weight update as servers see it: shut, loaded, proved, open; slowest rank"
    ),
    "memory/peak_gib": MetricInfo("GiB", "max", "largest memory in use in any phase since the last step, fullest rank"),
    "memory/peak_gib/*": MetricInfo("GiB", "max", "largest memory in use in this phase: a GPU's, or the process's own"),
    "curriculum/*": MetricInfo("1", "last", "what the curriculum reports of itself"),
    "time/*_s": MetricInfo("s", "mean", "seconds of the step in this phase, nested phases taken out, over ranks"),
    "eval/num_problems": MetricInfo("problems", "last", "held-out problems"),
    "eval/n": MetricInfo("rollouts", "last", "answers a problem"),
    "eval/loss": MetricInfo("fraction", "last", "1 - pass@1, held out", "arXiv:2509.25300"),
    "eval/pass@*": MetricInfo("fraction", "last", "held-out pass@k; pass@1 by level too", "arXiv:2107.03374, eq. 1"),
    "eval/maj@*": MetricInfo("fraction", "last", "held-out answers by vote of k samples", "arXiv:2203.11171"),
    "eval/passuntil": MetricInfo("fraction", "last", "pass rate, tried on where it is low", "arXiv:2310.03262"),
    "eval/drawn": MetricInfo("rollouts", "last", "answers that PassUntil drew in all"),
    "eval/unjudged": MetricInfo("rollouts", "last", "held-out answers that no reward could judge: in no figure"),
    "eval/concentration": MetricInfo("fraction", "last", "held-out pass@1 / pass@k, k the largest"),
    "eval/gained_frac": MetricInfo("fraction", "last", "problems solved now, not at the first evaluation"),
    "eval/lost_frac": MetricInfo("fraction", "last", "problems solved at the first evaluation and not now"),
    "eval/length_mean": MetricInfo("tokens", "last", "tokens of a held-out completion"),
    "eval/truncated_frac": MetricInfo("fraction", "last", "held-out completions that ran into the length limit"),
}
"""First match wins; `*` stands for the part of a family's name that only the run knows."""


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
        self._values: dict[str, list[float]] = {}

    def mean(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add to a weighted mean: sum(w v) / sum(w)."""
        self._add(name, "mean", value * weight if weight else 0.0, weight)

    def means(self, name: str, values: Sequence[float]) -> None:
        """Add many values to a mean at once."""
        if values:
            self._add(name, "mean", sum(values), len(values))

    def sum(self, name: str, value: float) -> None:
        """Add to a sum over ranks."""
        self._add(name, "sum", value, 1.0)

    def max(self, name: str, value: float) -> None:
        """Raise a maximum over ranks."""
        self._add(name, "max", value, 1.0)

    def last(self, name: str, value: float) -> None:
        """Set a figure that is the same on every rank."""
        self._add(name, "last", value, 1.0)

    def std(self, name: str, values: Sequence[float]) -> None:
        """Add values whose standard deviation is wanted."""
        self._collect(name, "std", name, values)

    def quantiles(self, family: str, values: Sequence[float]) -> None:
        """Add values whose quantiles are wanted, as `<family>_p10` and so on."""
        self._collect(f"{family}_p50", "quantile", family, values)

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
        values: dict[str, list[float]] = {}
        for one_rank, own in self.world.all_gather_object((self._local(), self._values)):
            for name, more in own.items():
                values.setdefault(name, []).extend(more)
            for name, entry in one_rank.items():
                merged[name] = _merge(metric_info(name).reduction, merged[name], entry) if name in merged else entry
        self._numbers, self._tensors, self._values = {}, {}, {}
        return _spreads(values) | {
            name: value / weight if metric_info(name).reduction == "mean" else value
            for name, (value, weight) in merged.items()
            if weight
        }

    def _collect(self, name: str, reduction: Reduction, family: str, values: Sequence[float]) -> None:
        self._check(name, reduction)
        self._values.setdefault(family, []).extend(values)

    def _check(self, name: str, reduction: Reduction) -> None:
        declared = metric_info(name).reduction
        if declared != reduction:
            raise ValueError(f"metric {name!r} is declared as {declared!r} in METRICS and was logged as {reduction!r}")

    def _add(self, name: str, reduction: Reduction, value: float, weight: float) -> None:
        self._check(name, reduction)
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


def _spreads(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Standard deviations and quantiles of what all ranks brought; of a quantile, the least value that holds it."""
    found: dict[str, float] = {}
    for family, numbers in values.items():
        if family in METRICS and numbers:
            found[family] = pstdev(numbers)
        elif numbers:
            ordered = sorted(numbers)
            for name, share in QUANTILES.items():
                found[f"{family}_{name}"] = ordered[math.ceil(share * len(ordered)) - 1]
    return found


def _merge(reduction: Reduction, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    if reduction == "last" or not b[1]:
        return a
    if reduction == "max" and a[1]:
        largest = math.nan if math.isnan(a[0] + b[0]) else max(a[0], b[0])
        return largest, a[1] + b[1]
    return b if reduction == "max" else (a[0] + b[0], a[1] + b[1])
