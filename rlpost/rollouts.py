"""The rollouts of a step: waves of tasks, answers and rewards, until there is enough to train on."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter

from rlpost import figures
from rlpost.balance import balanced
from rlpost.collect import add_to, answers, new_groups, shard
from rlpost.credit import add_length_rewards
from rlpost.curriculum import choice
from rlpost.errors import RunError
from rlpost.generate.base import Whole
from rlpost.measure import as_measured, measured_groups
from rlpost.partial import write_part
from rlpost.pipeline import Wave
from rlpost.run import Run
from rlpost.score import score
from rlpost.types import Group, Outcome, Request, Rollout
from rlpost.world import World


def gather(run: Run, step: int) -> list[Group]:
    """This rank's groups to train on, all scored.

    One wave, begun up to `generator.max_staleness` steps ago, or with `groups.without_spread=refill` as many as it
    takes for `prompts_per_step` groups with spread over all ranks (DAPO, arXiv:2503.14476), at most `groups.max_waves`.
    A wave is scored as a whole before anything is chosen from it, so quick answers have no advantage.
    """
    recipe, rule, world = run.recipe, run.recipe.algorithm.groups, run.world
    refill = rule.without_spread == "refill"
    wanted = size = recipe.prompts_per_step
    every: list[Group] = []
    kept: list[Group] = []
    drawn, waves = 0, 0
    with run.clock("sync"), run.generator.awake(run.engine, run.engine.updates):
        go_ahead(run, step)
        while True:
            groups = wave(run, step)
            every += groups
            kept += [group for group in groups if group.has_spread or rule.without_spread == "keep"]
            drawn, waves = drawn + size, waves + 1
            found = world.sum(len(kept))
            if not refill or found >= wanted or waves == rule.max_waves:
                break
            size = next_wave(wanted - found, found / drawn, ranks=world.size, limit=wanted)
            begin(run, step, size, of=step)
    run.metrics.last("groups/missing", max(wanted - found, 0) if refill else 0)
    if found > wanted:  # the ranks agree on the first so many
        ids = sorted(id for ids in world.all_gather_object([group.id for group in kept]) for id in ids)
        kept = [group for group in kept if group.id <= ids[wanted - 1]]
    with run.clock("log"):
        figures.log_rollouts(run, step, every, kept, waves)
    return kept


def go_ahead(run: Run, step: int) -> None:
    """Have waves on their way up to `generator.max_staleness` steps ahead; a checkpoint's are asked for again."""
    pipeline, last = run.pipeline, run.recipe.steps - 1
    for left in pipeline.waves:
        if left.work is None:
            run.world.together(partial(pipeline.start, left, partial(write, run)))
    for later in pipeline.to_begin(step, last):
        begin(run, step, run.recipe.prompts_per_step, of=later)


def begin(run: Run, step: int, size: int, *, of: int) -> None:
    """Choose `size` tasks over all ranks and have them answered: the wave of the step `of`."""
    recipe, world, pipeline = run.recipe, run.world, run.pipeline
    if (asked := measured_groups(run)) is not None:
        score_together(run, asked)
        run.curriculum.observe(as_measured(outcomes_of(run, step, asked)))
    with run.clock("select"):
        held, pipeline.held = pipeline.held, []
        every_rank = world.all_gather_object(len(held)) if pipeline.partial else [0] * world.size
        total, own = new_tasks(size, every_rank, world.rank)
        tasks = choice(run, total) if total else []  # the same list on every rank
    with run.clock("generate"):
        mine = list(enumerate(tasks))[own]
        how = {"first_group": run.next_group, "seed": recipe.seed, "begun": step, "version": run.engine.updates}
        started = pipeline.wave(of, step, [*held, *new_groups(run.renderer, mine, **how)])
        world.together(lambda: pipeline.start(started, partial(write, run)))  # waiting for the longest is generation
    run.next_group += total


def new_tasks(size: int, held: Sequence[int], rank: int) -> tuple[int, slice]:
    """How many tasks all ranks choose, and which are this rank's: with what is held, each has its share of `size`.

    >>> new_tasks(8, [0, 0], rank=1), new_tasks(8, [3, 1], rank=1)
    ((8, slice(4, 8, None)), (4, slice(1, 4, None)))
    """
    room = [max(0, len(shard(range(size), one, len(held))) - count) for one, count in enumerate(held)]
    start = sum(room[:rank])
    return sum(room), slice(start, start + room[rank])


def write(run: Run, wave: Wave, groups: Sequence[Group], whole: Whole) -> None:
    """Answer the tasks of these groups; in a thread where the generator can, so there is no collective in it."""
    recipe, generator, renderer, early = run.recipe, run.generator, run.renderer, run.rewards.early
    group_size, part = recipe.sampling.group_size, recipe.generator.partial_tokens
    if part is not None:
        held = write_part(groups, generator, renderer, run.sampling, group_size=group_size, tokens=part)
        wave.groups = [group for group in wave.groups if group not in held]
        run.pipeline.held = held
        for group in wave.groups:
            whole(group.rollouts)
        return

    def told(rollouts: Sequence[Rollout]) -> None:
        if early is not None:
            early(rollouts)
        if not greedy:
            whole(rollouts)

    greedy = recipe.algorithm.advantage["use"] == "remax"
    asked = [group.request(group_size) for group in groups]
    interruption = recipe.algorithm.interruption
    found = answers(generator, renderer, asked, run.sampling, interruption, whole=told)
    if greedy:
        wave.greedy = {group.id: replace(group, rollouts=[]) for group in groups}
        asked = [group.request(1) for group in groups]
        best = answers(generator, renderer, asked, replace(run.sampling, temperature=0.0), interruption)
        add_to(list(wave.greedy.values()), best)
    for _, rollouts in groupby(found, key=attrgetter("group")):
        whole(list(rollouts))


def wave(run: Run, step: int) -> list[Group]:
    """The groups of a wave, explored and scored; the curriculum learns of all of them."""
    recipe, world = run.recipe, run.world
    with run.clock("generate"):
        groups, greedy = world.together(lambda: run.pipeline.take(step))
        world.together(lambda: check_versions(groups))
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


def check_versions(groups: Sequence[Group]) -> None:
    """Stop where older weights wrote an answer than those that its group was begun with: a generator missed some."""
    for rollout, least in ((rollout, group.version) for group in groups for rollout in group.rollouts):
        if rollout.version < least:
            raise RunError(
                "generator: answers must be by the weights that the trainer sent last, or later ones (group "
                f"{rollout.group} was begun at version {least}, and version {rollout.version} wrote of it): it missed "
                "an update"
            )


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
