"""Answers that a curriculum asks for to learn how difficult tasks are now; nothing is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlpost.collect import collect, shard
from rlpost.curriculum import check_choice
from rlpost.types import Group, Outcome, Task


def measured_groups(run: Any) -> list[Group] | None:
    """This rank's share of the answers that the curriculum wants, not yet scored; None where it wants none.

    All ranks return None, or none does: they must want the same, which is checked.
    """
    if not hasattr(run.curriculum, "wants_measured"):
        return None
    tasks = run.curriculum.wants_measured()
    check_choice(tasks, None, run.curriculum, run.task_keys, run.world, method="wants_measured")
    if not tasks:
        return None
    return answered(run, tasks, getattr(run.curriculum, "measure_tries", None) or run.recipe.sampling.group_size)


def answered(run: Any, tasks: Sequence[Task], tries: int) -> list[Group]:
    """This rank's share of `tries` answers to each task by the current policy, not yet scored."""
    recipe, first_group = run.recipe, run.next_group
    run.next_group += len(tasks)
    with run.clock("measure"):
        groups = run.world.together(
            lambda: collect(
                run.generator,
                run.renderer,
                shard(tasks, run.world.rank, run.world.size),
                run.sampling,
                group_size=tries,
                first_group=first_group,
                seed=recipe.seed,
                interruption=recipe.algorithm.interruption,
            )
        )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    run.metrics.sum("rollouts/measured", len(rollouts))
    run.metrics.sum("tokens/measured", sum(rollout.num_written for rollout in rollouts))
    return groups


def as_measured(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, marked as not trained on."""
    return [replace(outcome, measured=True) for outcome in outcomes]
