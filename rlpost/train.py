"""Reinforcement learning: the loop, one step of it, and what is done between steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlpost import advantages, figures, losses
from rlpost.batch import make_batches
from rlpost.collect import collect, shard
from rlpost.errors import RunError, SharedError
from rlpost.kl import kl
from rlpost.progress import Progress
from rlpost.recipe import Recipe
from rlpost.run import Run, build
from rlpost.score import score
from rlpost.summary import write_summary
from rlpost.types import Group, Micro, Outcome
from rlpost.update import update
from rlpost.world import World


def train(recipe: Recipe, world: World) -> Path:
    """Train as the recipe says, and return the run's folder."""
    run = build(recipe, world)
    shown = Progress(recipe, world, total_steps=recipe.steps, start=run.start_step)
    with closing(run.generator), shown as progress:
        if run.evaluator and "before" not in run.evals:
            run.evals["before"] = evaluate(run, 0, progress)
        for step in range(run.start_step, recipe.steps):
            with saved_on_failure(run, step):
                progress.update(step, train_step(run, step))
            if run.evaluator and every(recipe.evaluation.every, step) and step + 1 < recipe.steps:
                evaluate(run, step + 1, progress)
            if every(recipe.save_every, step) or step + 1 == recipe.steps:
                save(run, step + 1)
        if run.evaluator:
            run.evals["after"] = evaluate(run, recipe.steps, progress)
        finish(run, progress)
    return run.folder


def train_step(run: Run, step: int) -> dict[str, float]:
    """One step: tasks, rollouts, rewards, advantages, optimizer steps, figures."""
    recipe, world, clock, metrics, engine = run.recipe, run.world, run.clock, run.metrics, run.engine
    with clock("select"):
        tasks = run.curriculum.select(recipe.prompts_per_step)  # the same list on every rank
    with clock("sync"), run.generator.awake(engine, engine.updates), clock("generate"):
        groups = collect(
            run.generator,
            run.renderer,
            shard(tasks, world.rank, world.size),
            run.sampling,
            group_size=recipe.sampling.group_size,
            first_group=step * recipe.prompts_per_step,
            seed=recipe.seed,
        )
        world.barrier()  # waiting for the longest answer is generation, on every rank
    with clock("reward"):
        run.curriculum.observe(score_together(run, step, groups))
    with clock("batch"):
        figures.log_rollouts(run, step, groups)
        kept = [group for group in groups if group.has_spread or not recipe.algorithm.drop_zero_spread]
        advantages_PG = [group_advantages(group, recipe) for group in kept]
        batches = make_batches(kept, advantages_PG, run.packer, world, minibatches=recipe.algorithm.minibatches)
    for epoch in range(recipe.algorithm.epochs):
        for place, batch in enumerate(batches):
            if not batch.step_tokens:  # counted over all ranks, so all ranks leave it out
                continue
            first = epoch == place == 0
            with clock("train"):
                update(engine, batch, partial(policy_loss, run, first=first), metrics)
            metrics.sum("tokens/trained", batch.step_tokens if world.is_main else 0)
    return figures.log_step(run, step)


def score_together(run: Run, step: int, groups: list[Group]) -> list[Outcome]:
    """Score this rank's groups, and return the outcomes of all ranks; where one fails, every rank raises its error."""
    error = None
    try:
        score(groups, run.rewards)
    except RunError as failed:
        error = failed
    outcomes = [Outcome(group.task.key, tuple(group.rewards), step) for group in groups]
    every_rank = run.world.all_gather_object((None if error is None else str(error), outcomes))
    for message, _ in every_rank:
        if message is not None:
            raise SharedError(message) from error
    return [outcome for _, one_rank in every_rank for outcome in one_rank]


@contextmanager
def saved_on_failure(run: Run, step: int) -> Iterator[None]:
    """Where all ranks fail together before the step has changed the policy, save what the steps before it gave."""
    updates, curriculum = run.engine.updates, run.curriculum.state_dict()
    try:
        yield
    except SharedError as error:
        if not step or run.engine.updates != updates:
            raise
        run.curriculum.load_state_dict(curriculum)
        save(run, step)
        raise RunError(f"{error}\n{step} steps are saved: correct this and go on with resume=auto") from error


def policy_loss(run: Run, micro: Micro, logp_BT: Tensor, *, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token `[B, T]`, and the figures to log of it; `first`: nothing was updated on these rollouts yet."""
    algorithm = run.recipe.algorithm
    assert algorithm.clip_low is not None and algorithm.clip_high is not None and algorithm.kl_estimator is not None
    loss_BT, stats = losses.ppo_clip(
        logp_BT, micro.behavior_logp_BT, micro.adv_BT, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high
    )
    logged = {
        "policy/ratio_mean": stats["ratio"],
        "policy/ratio_max": stats["ratio"],
        "policy/clipped_frac": stats["clipped"],
    }
    if first:
        # Rounding, if all is well: the policy has not moved since it wrote these tokens.
        diff_BT = (logp_BT.detach() - micro.behavior_logp_BT).abs()
        logged |= {"mismatch/logp_diff_mean": diff_BT, "mismatch/logp_diff_max": diff_BT}
    if run.reference is not None and algorithm.kl_coef:
        kl_BT = kl(algorithm.kl_estimator, logp_BT, run.reference.token_logp(micro))
        loss_BT = loss_BT + algorithm.kl_coef * kl_BT
        logged["policy/kl_ref"] = kl_BT
    return loss_BT, logged


def group_advantages(group: Group, recipe: Recipe) -> list[float]:
    """Advantages [G] of one group; a rollout that no reward could judge counts as NaN and gets 0."""
    rewards_G = torch.tensor([math.nan if reward is None else reward for reward in group.rewards], dtype=torch.float64)
    return advantages.grpo(rewards_G, scale_by_std=bool(recipe.algorithm.scale_by_std)).tolist()


def every(interval: int, step: int) -> bool:
    """Whether an action of this interval is due after the 0-based step; 0 means never."""
    return bool(interval) and (step + 1) % interval == 0


def evaluate(run: Run, step: int, progress: Progress) -> dict[str, float]:
    """Held-out figures of the policy after `step` steps, logged and returned."""
    assert run.evaluator is not None
    with run.clock("evaluate"):
        result = run.evaluator(run.generator, run.engine)
    run.trackers.log(max(step - 1, 0), {f"eval/{name}": value for name, value in result.items()})
    progress.message(
        f"evaluation after {step} steps: pass@1 {result['pass@1']:.3f} on {result['num_problems']:.0f} problems"
    )
    return result


def save(run: Run, step: int) -> None:
    """Write a checkpoint of everything that has a state, after `step` whole steps."""
    with run.clock("checkpoint"):
        state = {
            "curriculum": run.curriculum.state_dict(),
            "clock": run.clock.state_dict(),
            "evals": run.evals,
            "model": str(run.model),
        }
        run.checkpoints.save(step, run.engine, state)


def finish(run: Run, progress: Progress) -> None:
    """Write and show the summary."""
    run.clock.lap()
    if run.world.is_main:
        summary = write_summary(
            run.folder,
            recipe=run.recipe,
            seeds=[run.recipe.seed],
            before=run.evals.get("before"),
            after=run.evals.get("after"),
            wall_s=sum(run.clock.total.values()),
            phase_s=run.clock.total,
            steps=run.recipe.steps,
        )
        progress.final(summary)
    run.trackers.close()
    run.world.barrier()
