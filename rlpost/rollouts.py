"""The rollouts of a step: waves of tasks, answers and rewards, until there is enough to train on."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from rlpost import figures
from rlpost.balance import balanced
from rlpost.collect import add_to, answers, collect, shard
from rlpost.credit import add_length_rewards
from rlpost.curriculum import choice
from rlpost.measure import as_measured, measured_groups
from rlpost.run import Run
from rlpost.score import score
from rlpost.types import Group, Outcome, Request, Rollout
from rlpost.world import World


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
    run.metrics.last("groups/missing", max(wanted - found, 0) if refill else 0)
    if found > wanted:  # the ranks agree on the first so many
        ids = sorted(id for ids in world.all_gather_object([group.id for group in kept]) for id in ids)
        kept = [group for group in kept if group.id <= ids[wanted - 1]]
    with run.clock("log"):
        figures.log_rollouts(run, step, every, kept, waves)
    return kept


def wave(run: Run, step: int, size: int) -> list[Group]:
    """`size` tasks over all ranks, answered, explored and scored; the curriculum learns of all of them."""
    recipe, world = run.recipe, run.world
    if (asked := measured_groups(run)) is not None:
        score_together(run, asked)
        run.curriculum.observe(as_measured(outcomes_of(run, step, asked)))
    with run.clock("select"):
        tasks = choice(run, size)  # the same list on every rank
        mine = shard(tasks, world.rank, world.size)
    with run.clock("generate"):
        how: dict[str, Any] = {"first_group": run.next_group, "seed": recipe.seed, "whole": run.rewards.early}
        group_size, interruption = recipe.sampling.group_size, recipe.algorithm.interruption
        parts = run.generator, run.renderer, mine
        sampled = partial(collect, *parts, run.sampling, group_size=group_size, interruption=interruption, **how)
        groups = world.together(sampled)  # waiting for the longest answer is generation, on every rank
        greedy = []
        if recipe.algorithm.advantage["use"] == "remax":
            greedy = world.together(
                lambda: collect(*parts, replace(run.sampling, temperature=0.0), group_size=1, **how)
            )
    run.next_group += size
    with run.clock("reward"):
        score_together(run, [*groups, *greedy])
        for group, answer in zip(groups, greedy, strict=False):
            reward = answer.rollouts[0].reward
            group.greedy_reward = math.nan if reward is None else reward
    if run.explorers.every:
        explore(run, step, groups)
    if run.rewards.of_groups:
        with run.clock("reward"):
            world.together(lambda: run.rewards.score_groups(groups))
    with run.clock("reward"):
        outcomes = outcomes_of(run, step, groups)
        run.curriculum.observe(outcomes)
        run.chosen.observe(outcomes)
        run.explorers.observe(outcomes)
        run.metrics.sum("explore/newly_solved", run.frontier.observe(outcomes) if world.is_main else 0)
        add_length_rewards(groups, recipe.algorithm.length, budget=recipe.sampling.max_new_tokens, step=step)
    return groups


def explore(run: Run, step: int, groups: list[Group]) -> None:
    """Waves of what the explorers ask for, each scored before the next, until nobody asks or the budget ends.

    Every rank answers as many requests as the others, whoever asked.
    """
    budget, world = run.recipe.explore_budget, run.world
    left = sys.maxsize if budget.rollouts is None else budget.rollouts // world.size
    for waves in range(1, budget.waves + 1):
        with run.clock("explore"):
            requests = within(world.together(lambda: run.explorers.requests(step, groups)), left)
            left -= sum(request.n for request in requests)
            if not world.sum(len(requests)):
                break
            mine = balanced([(world.rank, one) for one in requests], [float(one.n) for one in requests], world)
        with run.clock("generate"):
            asked = [request for _, request in mine]
            parts = run.generator, run.renderer, asked, run.sampling, run.recipe.algorithm.interruption
            found = world.together(partial(answers, *parts))
            found = sent_home(found, {request.group: home for home, request in mine}, world)
        with run.clock("reward"):
            score_together(run, [Group(-1, one.task, [one]) for one in found])
        add_to(groups, found)
        run.metrics.sum("explore/rollouts", len(found))
        run.metrics.max("explore/waves", waves)
    world.together(lambda: run.explorers.settle(groups))


def score_together(run: Run, groups: list[Group]) -> None:
    """Score this rank's rollouts; where a reward fails on one rank, every rank raises its error."""
    run.world.together(lambda: score(groups, run.rewards))


def within(requests: list[Request], rollouts: int) -> list[Request]:
    """Requests cut to a number of rollouts, in order.

    >>> from rlpost.types import Task
    >>> [one.n for one in within([Group(0, Task("a", ""), []).request(n) for n in (4, 4, 4)], 6)]
    [4, 2]
    """
    kept = []
    for request in requests:
        if rollouts < 1:
            break
        kept.append(replace(request, n=min(request.n, rollouts)))
        rollouts -= request.n
    return kept


def sent_home(rollouts: list[Rollout], homes: dict[int, int], world: World) -> list[Rollout]:
    """This rank's rollouts, from whatever rank made them; `homes` has the rank of each group that this one made."""
    if world.size == 1:
        return rollouts
    every_rank = world.all_gather_object([(homes[rollout.group], rollout) for rollout in rollouts])
    return [rollout for made in every_rank for home, rollout in made if home == world.rank]


def outcomes_of(run: Run, step: int, groups: list[Group]) -> list[Outcome]:
    """The outcomes of all ranks' groups, in the order of ranks."""
    every_rank = run.world.all_gather_object([outcome(group, step) for group in groups])
    return [one for one_rank in every_rank for one in one_rank]


def outcome(group: Group, step: int) -> Outcome:
    """What the curriculum and the explorers hear of a group: what the policy did alone, and under hints."""
    alone = group.by_policy
    hinted = tuple((one.level, one.passed) for one in (*group.rollouts, *group.left_out) if one.level)
    rewards, passed = tuple(one.reward for one in alone), tuple(one.passed for one in alone)
    return Outcome(group.task.key, rewards, step, passed, hinted)


def next_wave(missing: int, acceptance: float, *, ranks: int, limit: int) -> int:
    """How many prompts to try for `missing` more groups: by the share that had spread so far, in whole ranks.

    >>> next_wave(8, 0.5, ranks=2, limit=64), next_wave(8, 0.0, ranks=2, limit=64), next_wave(1, 1.0, ranks=2, limit=64)
    (16, 64, 2)
    """
    tried = missing / acceptance if acceptance else limit
    return min(limit, math.ceil(tried / ranks) * ranks)
