"""The rollouts of a step: waves of tasks, answers and rewards, until there is enough to train on."""

from __future__ import annotations

import math
from dataclasses import replace

from rlpost import figures
from rlpost.collect import collect, shard
from rlpost.credit import add_length_rewards
from rlpost.curriculum import choice
from rlpost.errors import RunError, SharedError
from rlpost.measure import as_measured, measured_groups
from rlpost.run import Run
from rlpost.score import score
from rlpost.types import Group, Outcome


def gather(run: Run, step: int) -> list[Group]:
    """This rank's groups to train on, all scored.

    One wave, or with `groups.without_spread=refill` as many as it takes for `prompts_per_step` groups with spread over
    all ranks (DAPO, arXiv:2503.14476), at most `groups.max_waves`. A wave is scored as a whole before anything is
    chosen from it, so quick answers have no advantage.
    """
    recipe, rule, world = run.recipe, run.recipe.algorithm.groups, run.world
    refill = rule.without_spread == "refill"
    wanted = size = recipe.prompts_per_step
    every: list[Group] = []
    kept: list[Group] = []
    drawn, waves = 0, 0
    with run.clock("sync"), run.generator.awake(run.engine, run.engine.updates):
        while True:
            groups = wave(run, step, size)
            every += groups
            kept += [group for group in groups if group.has_spread or rule.without_spread == "keep"]
            drawn, waves = drawn + size, waves + 1
            found = world.sum(len(kept))
            if not refill or found >= wanted or waves == rule.max_waves:
                break
            size = next_wave(wanted - found, found / drawn, ranks=world.size, limit=wanted)
    if found > wanted:  # the ranks agree on the first so many
        ids = sorted(id for ids in world.all_gather_object([group.id for group in kept]) for id in ids)
        kept = [group for group in kept if group.id <= ids[wanted - 1]]
    with run.clock("log"):
        figures.log_rollouts(run, step, every, kept, waves)
    return kept


def wave(run: Run, step: int, size: int) -> list[Group]:
    """`size` tasks over all ranks, answered and scored; the curriculum learns of all of them."""
    recipe, world = run.recipe, run.world
    if (asked := measured_groups(run)) is not None:
        run.curriculum.observe(as_measured(score_together(run, step, asked, [])))
    with run.clock("select"):
        tasks = choice(run, size)  # the same list on every rank
        mine = shard(tasks, world.rank, world.size)
    with run.clock("generate"):
        groups = collect(
            run.generator,
            run.renderer,
            mine,
            run.sampling,
            group_size=recipe.sampling.group_size,
            first_group=run.next_group,
            seed=recipe.seed,
            interruption=recipe.algorithm.interruption,
        )
        greedy = []
        if recipe.algorithm.advantage["use"] == "remax":
            sampling = replace(run.sampling, temperature=0.0)
            greedy = collect(
                run.generator, run.renderer, mine, sampling, group_size=1, first_group=run.next_group, seed=recipe.seed
            )
        world.barrier()  # waiting for the longest answer is generation, on every rank
    run.next_group += size
    with run.clock("reward"):
        run.curriculum.observe(score_together(run, step, groups, greedy))
        add_length_rewards(groups, recipe.algorithm.length, budget=recipe.sampling.max_new_tokens, step=step)
    return groups


def next_wave(missing: int, acceptance: float, *, ranks: int, limit: int) -> int:
    """How many prompts to try for `missing` more groups: by the share that had spread so far, in whole ranks.

    >>> next_wave(8, 0.5, ranks=2, limit=64), next_wave(8, 0.0, ranks=2, limit=64), next_wave(1, 1.0, ranks=2, limit=64)
    (16, 64, 2)
    """
    tried = missing / acceptance if acceptance else limit
    return min(limit, math.ceil(tried / ranks) * ranks)


def score_together(run: Run, step: int, groups: list[Group], greedy: list[Group]) -> list[Outcome]:
    """Score this rank's groups, and return the outcomes of all ranks; where one fails, every rank raises its error."""
    error = None
    try:
        score([*groups, *greedy], run.rewards)
    except RunError as failed:
        error = failed
    for group, answer in zip(groups, greedy, strict=False):
        reward = answer.rollouts[0].reward
        group.greedy_reward = math.nan if reward is None else reward
    outcomes = [
        Outcome(group.task.key, tuple(group.rewards), step, tuple(rollout.passed for rollout in group.rollouts))
        for group in groups
    ]
    every_rank = run.world.all_gather_object((None if error is None else str(error), outcomes))
    for message, _ in every_rank:
        if message is not None:
            raise SharedError(message) from error
    return [outcome for _, one_rank in every_rank for outcome in one_rank]
