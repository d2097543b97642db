"""What a training step logs of its rollouts, its updates and its weight sync."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from rlpost.evaluate import pass_at_k
from rlpost.explore._hints import copied_frac
from rlpost.mass_balance import of_groups
from rlpost.metrics import Metrics
from rlpost.run import Run
from rlpost.types import Group, Rollout


def log_rollouts(run: Run, step: int, groups: list[Group], kept: list[Group], waves: int) -> None:
    """Figures of all rollouts of the step and of those that are trained on, and some of them to read."""
    metrics, weights = run.metrics, {reward.name: reward.weight for reward in run.rewards}
    _log_balance(metrics, groups)
    for group in groups:
        _log_group(metrics, group)
    trained = [rollout for group in kept for rollout in group.rollouts if rollout.inclusion]
    metrics.means("guided/trained_frac", [float(rollout.role != "policy") for rollout in trained])
    chosen = {id(rollout) for rollout in trained}
    generated = [rollout for group in groups for rollout in (*group.rollouts, *group.left_out)]
    thrown_away = [one for one in generated if one.role != "expert" and id(one) not in chosen]
    alone = [rollout for rollout in generated if rollout.role == "policy"]
    _log_verdicts(metrics, generated)
    _log_turns(metrics, generated)
    for rollout in generated:
        if rollout.role != "policy":
            _log_helped(metrics, rollout)
    if alone:
        _log_alone(metrics, alone, weights)
    if run.recipe.algorithm.length["use"] != "none":
        metrics.means("reward/length_bonus", [rollout.length_reward for rollout in alone])
    metrics.quantiles("rollouts/length", [len(rollout.token_ids) for rollout in alone])
    metrics.std("reward/std_all", [rollout.reward for rollout in alone if rollout.reward is not None])
    metrics.sum("groups/num", len(groups))
    metrics.sum("groups/trained", len(kept))
    metrics.sum("rollouts/discarded", len(thrown_away))
    metrics.sum("tokens/discarded", sum(rollout.num_written for rollout in thrown_away))
    metrics.last("groups/waves", waves)
    if run.pipeline.keeps:
        _log_pipeline(run, step, groups)
    if run.world.is_main:
        run.samples.choose(groups)
        run.chosen.write(step)


def _log_pipeline(run: Run, step: int, groups: Sequence[Group]) -> None:
    """How long ago the step's groups were begun, and how long the answers are that came early or as late as may be."""
    metrics, pipeline = run.metrics, run.pipeline
    metrics.sum("pipeline/waiting", sum(len(wave.groups) for wave in pipeline.waves))
    metrics.sum("pipeline/held", len(pipeline.held))
    for group in groups:
        waited = step - group.begun
        metrics.mean("pipeline/age_mean", waited)
        metrics.max("pipeline/age_max", waited)
        name = "pipeline/length_early" if waited < pipeline.bound else "pipeline/length_due"
        metrics.means(name, [len(rollout.token_ids) for rollout in group.by_policy])
        changed = [bool(rollout.later_versions) for rollout in group.by_policy]
        metrics.means("pipeline/several_versions_frac", [float(one) for one in changed])


def _log_group(metrics: Metrics, group: Group) -> None:
    """Of what the policy wrote without help: spread, and pass@k for every power of two; free, as all of it is there."""
    metrics.mean("groups/spread_frac", float(group.has_spread))
    alone = group.by_policy
    judged = [rollout.reward for rollout in alone if rollout.reward is not None]
    if len(judged) > 1:
        metrics.mean("reward/std", float(torch.tensor(judged, dtype=torch.float64).std()))
    passed = [rollout.passed for rollout in alone if rollout.passed is not None]
    if passed:
        metrics.mean("groups/all_solved_frac", float(not group.has_spread and all(passed)))
        metrics.mean("groups/none_solved_frac", float(not group.has_spread and not any(passed)))
    for i in range(len(passed).bit_length()):
        metrics.mean(f"rollouts/pass@{1 << i}", pass_at_k(len(passed), sum(passed), 1 << i))


def _log_balance(metrics: Metrics, groups: Sequence[Group]) -> None:
    """What was drawn, and what was not, of each group that the policy wrote more than one judged answer of."""
    alone = [group.by_policy for group in groups]
    several = [one for one in alone if sum(rollout.passed is not None for rollout in one) > 1]
    for balance in of_groups(
        [
            (
                [rollout.token_ids for rollout in one],
                [rollout.behavior_logp for rollout in one],
                [rollout.passed for rollout in one],
            )
            for one in several
        ]
    ):
        terms = asdict(balance.terms) | {"states": balance.num_states, "shared_frac": balance.shared_frac}
        for name, value in (terms | {"mixed": balance.mixed}).items():
            if not math.isnan(value):
                metrics.mean(f"mass/{name}", value)


def _log_verdicts(metrics: Metrics, rollouts: Sequence[Rollout]) -> None:
    """How each reward ended, how long it took, and the parts that it named."""
    endings: Counter[str] = Counter()
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, verdict in rollout.verdicts.items():
            endings[f"reward/endings/{name}/{verdict.ending}"] += 1
            seconds[f"reward/latency/{name}"].append(verdict.seconds)
            if rollout.role == "policy":
                for figure, value in verdict.parts.items():
                    parts[f"reward/{name}/{figure}"].append(value)
    for name, count in endings.items():
        metrics.sum(name, count)
    for name, values in seconds.items():
        metrics.quantiles(name, values)
    for name, values in parts.items():
        metrics.means(name, values)


def _log_turns(metrics: Metrics, rollouts: Sequence[Rollout]) -> None:
    """Who wrote how much of the answers that a rollout function led."""
    led = [rollout.turns for rollout in rollouts if rollout.turns]
    tools = [[turn for turn in turns if turn.writer == "tool"] for turns in led]
    metrics.means("tools/turns", [len(turns) - len(calls) for turns, calls in zip(led, tools, strict=True)])
    metrics.means("tools/calls", [len(calls) for calls in tools])
    metrics.means("tools/errors", [sum(turn.error for turn in calls) for calls in tools])
    metrics.means("tools/length", [sum(turn.num_tokens for turn in calls) for calls in tools])


def _log_alone(metrics: Metrics, rollouts: Sequence[Rollout], weights: Mapping[str, float]) -> None:
    """What the policy wrote without help: a column at a time, as there are many rows."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    metrics.sum("rollouts/num", len(rollouts))
    metrics.sum("tokens/generated", sum(rollout.num_written for rollout in rollouts))
    metrics.means("rollouts/length_mean", lengths)
    metrics.max("rollouts/length_max", max(lengths))
    metrics.means("rollouts/truncated_frac", [float(rollout.truncated) for rollout in rollouts])
    if interrupted := sum(rollout.interrupted for rollout in rollouts):
        metrics.sum("rollouts/interrupted", interrupted)
    judged = [rollout for rollout in rollouts if rollout.reward is not None]
    metrics.means("reward/mean", [rollout.reward for rollout in judged if rollout.reward is not None])
    full = sum(weights.values())
    own = [sum(w * (rollout.reward_parts.get(name) or 0.0) for name, w in weights.items()) for rollout in judged]
    metrics.means("reward/solved_frac", [float(reward >= full) for reward in own])
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.reward_parts):
        parts = [rollout.reward_parts[name] for rollout in rollouts if name in rollout.reward_parts]
        known = [part for part in parts if part is not None]
        metrics.means(f"reward/{name}", known)
        if len(known) < len(parts):
            metrics.sum(f"reward/unjudged/{name}", len(parts) - len(known))


def _log_helped(metrics: Metrics, rollout: Rollout) -> None:
    """An answer under a hint, or of somebody else: apart from what says how well the policy does."""
    metrics.sum(f"{rollout.role}/num", 1)
    if rollout.role == "guided":
        metrics.sum("tokens/generated", rollout.num_written)
        metrics.mean("guided/copied_frac", copied_frac(rollout.hint, rollout.text))
    if rollout.passed is not None:
        metrics.mean(f"{rollout.role}/solved_frac", float(rollout.passed))
        if rollout.level:
            metrics.mean(f"guided/solved_frac/level_{rollout.level}", float(rollout.passed))


def log_step(run: Run, step: int) -> dict[str, float]:
    """Merge the step's figures over ranks and hand them to the trackers."""
    metrics, report = run.metrics, run.generator.report
    with run.clock("log"):
        metrics.last("optim/lr", run.engine.lr)
        metrics.last("optim/steps", run.engine.updates)
        metrics.last("optim/skipped_steps", run.engine.skipped)
        metrics.max("sync/seconds", report.seconds)
        metrics.last("sync/bytes", report.num_bytes)
        metrics.mean("sync/gb_per_s", report.gb_per_s)
        metrics.mean("canary/logp_diff_mean", report.canary_mean)
        metrics.max("canary/logp_diff_max", report.canary_max)
        for name, value in report.figures.items():
            metrics.add(name, value)
        for name, value in run.curriculum.metrics().items():
            metrics.last(f"curriculum/{name}", value)
        for name, value in (run.objective.mismatch_figures() | run.objective.figures()).items():
            metrics.last(name, value)
        for name, value in run.explorers.metrics().items():
            metrics.add(f"explore/{name}", value)
        for name, value in (run.noise.figures() | (run.frontier.figures() if run.world.is_main else {})).items():
            metrics.add(name, value)
        run.accounts.log(metrics)
    for name, value in run.clock.lap().items():
        (metrics.max if name.startswith("memory/") else metrics.mean)(name, value)
    with run.clock("log"):
        figures = metrics.reduce()
        figures |= followed(run, figures) | run.accounts.close_step(figures)
        run.trackers.log(step, figures)
    return figures


def followed(run: Run, figures: Mapping[str, float]) -> dict[str, float]:
    """What follows from the merged figures of a step."""
    found: dict[str, float] = {}
    powers = [int(name.partition("@")[2]) for name in figures if name.startswith("rollouts/pass@")]
    if powers:
        found["rollouts/loss"] = 1 - figures["rollouts/pass@1"]
        best = figures[f"rollouts/pass@{max(powers)}"]
        if best and max(powers) > 1:
            found["capability/concentration"] = figures["rollouts/pass@1"] / best
        if (entropy := figures.get("policy/entropy")) is not None and math.isfinite(entropy):
            run.law.observe(entropy=entropy, success=figures["rollouts/pass@1"])
    if {"pipeline/length_early", "pipeline/length_due"} <= figures.keys():
        found["pipeline/length_bias"] = figures["pipeline/length_early"] - figures["pipeline/length_due"]
    if "policy/kl_ref" in figures and not run.objective.num_resets:
        found["policy/kl_start"] = figures["policy/kl_ref"]
    return found | run.law.figures()
