"""What a training step logs of its rollouts, its updates and its weight sync."""

from __future__ import annotations

import torch

from rlpost.metrics import Metrics
from rlpost.run import Run
from rlpost.types import Group, Rollout


def log_rollouts(run: Run, step: int, groups: list[Group], kept: list[Group], waves: int) -> None:
    """Figures of all rollouts of the step and of those that are trained on, and some of them to read."""
    metrics, full = run.metrics, sum(reward.weight for reward in run.rewards)
    for group in groups:
        metrics.mean("groups/spread_frac", float(group.has_spread))
        judged = [reward for reward in group.rewards if reward is not None]
        if len(judged) > 1:
            metrics.mean("reward/std", float(torch.tensor(judged, dtype=torch.float64).std()))
        for rollout in group.rollouts:
            _log_rollout(metrics, rollout, full)
            if run.recipe.algorithm.length["use"] != "none":
                metrics.mean("reward/length_bonus", rollout.length_reward)
    chosen = {group.id for group in kept}
    thrown_away = [rollout for group in groups if group.id not in chosen for rollout in group.rollouts]
    metrics.sum("groups/num", len(groups))
    metrics.sum("groups/trained", len(kept))
    metrics.sum("rollouts/discarded", len(thrown_away))
    metrics.sum("tokens/discarded", sum(len(rollout.token_ids) for rollout in thrown_away))
    metrics.last("groups/waves", waves)
    if run.world.is_main:
        run.samples.write(step, groups)


def _log_rollout(metrics: Metrics, rollout: Rollout, full: float) -> None:
    length = len(rollout.token_ids)
    metrics.sum("rollouts/num", 1)
    metrics.sum("tokens/generated", length)
    metrics.mean("rollouts/length_mean", length)
    metrics.max("rollouts/length_max", length)
    metrics.mean("rollouts/truncated_frac", float(rollout.truncated))
    if rollout.interrupted:
        metrics.sum("rollouts/interrupted", 1)
    if rollout.reward is not None:
        metrics.mean("reward/mean", rollout.reward)
        metrics.mean("reward/solved_frac", float(rollout.reward >= full))
    for name, part in rollout.reward_parts.items():
        if part is None:
            metrics.sum(f"reward/unjudged/{name}", 1)
        else:
            metrics.mean(f"reward/{name}", part)


def log_step(run: Run, step: int) -> dict[str, float]:
    """Merge the step's figures over ranks and hand them to the trackers."""
    metrics, report = run.metrics, run.generator.report
    with run.clock("log"):
        metrics.last("optim/lr", run.engine.lr)
        metrics.last("optim/steps", run.engine.updates)
        metrics.max("sync/seconds", report.seconds)
        metrics.last("sync/bytes", report.num_bytes)
        metrics.mean("sync/gb_per_s", report.gb_per_s)
        metrics.mean("canary/logp_diff_mean", report.canary_mean)
        metrics.max("canary/logp_diff_max", report.canary_max)
        for name, value in run.curriculum.metrics().items():
            metrics.last(f"curriculum/{name}", value)
        for name, value in (run.objective.mismatch_figures() | run.objective.figures()).items():
            metrics.last(name, value)
    for name, value in run.clock.lap().items():
        (metrics.max if name.startswith("memory/") else metrics.mean)(name, value)
    with run.clock("log"):
        figures = metrics.reduce()
        run.trackers.log(step, figures)
    return figures
