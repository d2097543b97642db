"""Waves of generation: what is kept, what is thrown away and counted, and when a step has enough."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rlpost.algorithm_recipe import Algorithm, Groups
from rlpost.batch import documents_of, make_batch
from rlpost.errors import SharedError
from rlpost.metrics import Clock, Metrics
from rlpost.packing import Packer
from rlpost.recipe import Recipe, SamplingRecipe
from rlpost.rollouts import gather, next_wave
from rlpost.score import bind_rewards
from rlpost.types import Rollout, Sampling, Task

ROWS = {"mixed": (1.0, 0.0), "solved": (1.0, 1.0), "hopeless": (0.0, 0.0)}


class World:
    """One rank, or one of two whose other rank found groups with these ids."""

    rank, size, is_main = 0, 1, True

    def __init__(self, others=()):
        self.others = list(others)
        self.size = 1 + bool(others)

    def sum(self, value):
        return value + len(self.others)

    def barrier(self):
        pass

    def all_gather_object(self, item):
        if isinstance(item, list) and all(isinstance(one, int) for one in item) and self.others:
            return [item, self.others]
        return [item]


class Curriculum:
    """Tasks of these kinds, in order and over again."""

    def __init__(self, *kinds):
        self.kinds, self.taken, self.observed = kinds, 0, []

    def select(self, n):
        chosen = [self.kinds[(self.taken + i) % len(self.kinds)] for i in range(n)]
        tasks = [Task(f"t{self.taken + i}", kind, answer=kind) for i, kind in enumerate(chosen)]
        self.taken += n
        return tasks

    def observe(self, outcomes):
        self.observed += outcomes


class Generator:
    """Answers as the task's kind says; a greedy answer is a third."""

    def __init__(self):
        self.wakes, self.greedy = 0, 0

    @contextmanager
    def awake(self, engine, version):
        self.wakes += 1
        yield

    def generate(self, requests, sampling):
        return [self.answer(one, i, sampling) for one in requests for i in range(one.n)]

    def answer(self, one, i, sampling):
        self.greedy += sampling.temperature == 0
        text = "0.75" if sampling.temperature == 0 else str(ROWS[one.task.answer][i])
        return Rollout(one.task, one.group, (1,), (1,), (2, 3), (-1.0, -1.0), "stop", 0, text=text)


def said(rollout):
    """The number in the answer, as a reward."""
    return math.nan if rollout.text == "bad" else float(rollout.text)


def make_run(*kinds, prompts=4, world=None, **algorithm):
    world = world or World()
    recipe = Recipe(
        prompts_per_step=prompts,
        sampling=SamplingRecipe(group_size=2, max_new_tokens=8),
        algorithm=Algorithm(**algorithm),
        rewards=[{"use": "test_rollouts:said"}],
    )
    return SimpleNamespace(
        recipe=recipe,
        world=world,
        clock=Clock(),
        curriculum=Curriculum(*kinds),
        generator=Generator(),
        engine=SimpleNamespace(updates=0),
        renderer=SimpleNamespace(prompt_ids=lambda task: (1,)),
        sampling=Sampling(max_new_tokens=8),
        rewards=bind_rewards(recipe.rewards),
        metrics=Metrics(SimpleNamespace(all_gather_object=lambda item: [item])),
        samples=SimpleNamespace(write=lambda step, groups: None),
        next_group=0,
        task_keys=None,
    )


def kinds_of(groups):
    return [group.task.answer for group in groups]


@pytest.mark.parametrize(
    ("without_spread", "wanted"),
    [("keep", ["mixed", "solved", "hopeless", "mixed"]), ("drop", ["mixed", "mixed"])],
)
def test_groups_without_spread_are_kept_or_dropped_in_one_wave(without_spread, wanted):
    run = make_run("mixed", "solved", "hopeless", groups=Groups(without_spread))
    assert kinds_of(gather(run, 0)) == wanted
    figures = run.metrics.reduce()
    assert figures["groups/num"] == 4 and figures["groups/trained"] == len(wanted) and figures["groups/waves"] == 1
    assert figures["rollouts/discarded"] == 2 * (4 - len(wanted))
    assert figures["tokens/discarded"] == 4 * (4 - len(wanted)) and figures["tokens/generated"] == 16
    assert len(run.curriculum.observed) == 4 and run.next_group == 4


def test_refill_goes_on_until_enough_groups_have_spread_and_counts_what_it_threw_away():
    run = make_run("mixed", "solved", "hopeless", "solved", groups=Groups("refill"))
    groups = gather(run, 0)
    assert kinds_of(groups) == ["mixed"] * 4
    assert [group.id for group in groups] == [0, 4, 8, 12]  # the first in order, none for being quick
    figures = run.metrics.reduce()
    assert figures["groups/trained"] == 4 and figures["groups/num"] == run.next_group == len(run.curriculum.observed)
    assert figures["rollouts/discarded"] == figures["rollouts/num"] - 8
    assert run.generator.wakes == 1


def test_t24_refill_chooses_by_number_whatever_order_the_answers_come_in():
    """Long answers come last: choosing what is there first would train on short ones."""

    class Slow(Generator):
        def generate(self, requests, sampling):
            return sorted(super().generate(requests, sampling), key=lambda rollout: -rollout.group)

    kinds = ("solved", "mixed", "mixed")
    prompt, late = make_run(*kinds, groups=Groups("refill")), make_run(*kinds, groups=Groups("refill"))
    late.generator = Slow()
    assert [group.id for group in gather(late, 0)] == [group.id for group in gather(prompt, 0)] == [1, 2, 4, 5]


def test_t24_dropped_groups_leave_the_denominator_and_kept_ones_stay_in_it():
    """Without half of the groups a token of the others counts twice as much: drop is no filter for free."""
    weights = {}
    for rule in ("keep", "drop"):
        run = make_run("mixed", "solved", groups=Groups(rule))
        run.world.max = lambda value: value
        batch = make_batch(documents_of(gather(run, 0)), Packer(64, 64, torch.device("cpu")), run.world)
        weights[rule] = {round(1 / weight) for weight in batch.micros[0].weight_BT.unique().tolist() if weight}
    assert weights == {"keep": {16}, "drop": {8}}


def test_refill_ends_with_its_budget_and_trains_on_what_it_has():
    run = make_run("hopeless", groups=Groups("refill", max_waves=3))
    assert gather(run, 0) == []
    assert run.metrics.reduce()["groups/waves"] == 3
    run = make_run("mixed", "hopeless", "hopeless", "hopeless", groups=Groups("refill", max_waves=2))
    assert kinds_of(gather(run, 0)) == ["mixed"] * 2


def test_surplus_is_chosen_by_number_over_all_ranks():
    run = make_run("mixed", prompts=4, world=World(others=[2, 3, 6]), groups=Groups("refill"))
    # this rank made 0 and 1 (of four, shared by two); the other has 2, 3 and 6: the first four are wanted
    assert [group.id for group in gather(run, 0)] == [0, 1]
    run = make_run("mixed", prompts=4, world=World(others=[-3, -2, -1]), groups=Groups("refill"))
    assert [group.id for group in gather(run, 0)] == [0]


def test_the_next_wave_is_as_large_as_the_acceptance_so_far_suggests():
    assert next_wave(3, 0.25, ranks=1, limit=64) == 12
    assert next_wave(3, 0.25, ranks=8, limit=64) == 16
    assert next_wave(60, 0.1, ranks=8, limit=64) == 64


def test_t9_spread_is_an_exact_comparison():
    ROWS["close"] = (0.1 + 0.2, 0.3)
    assert kinds_of(gather(make_run("close", "solved"), 0)) == ["close"] * 2


def test_remax_asks_for_one_greedy_answer_a_prompt():
    run = make_run("mixed", advantage={"use": "remax"})
    assert [group.greedy_reward for group in gather(run, 0)] == [0.75] * 4
    assert run.generator.greedy == 4 and run.metrics.reduce()["rollouts/num"] == 8


def test_outcomes_say_what_passed():
    run = make_run("mixed")
    gather(run, 7)
    assert run.curriculum.observed[0].passed == (True, False) and run.curriculum.observed[0].step == 7


def test_a_reward_that_fails_stops_every_rank_with_its_message():
    ROWS["bad"] = ("bad", "bad")
    with pytest.raises(SharedError, match="must return a finite number"):
        gather(make_run("bad"), 0)


def test_clock_charges_each_part_of_a_wave_to_its_phase():
    run = make_run("mixed")
    gather(run, 0)
    phases = {"time/select_s", "time/generate_s", "time/reward_s", "time/sync_s", "time/log_s"}
    assert phases <= run.clock.lap().keys()
