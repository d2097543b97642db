"""Waves of generation: what is kept, what is thrown away and counted, and when a step has enough."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rlpost.algorithm_recipe import Algorithm, Groups
from rlpost.batch import documents_of, make_batch
from rlpost.clock import Clock
from rlpost.errors import SharedError
from rlpost.explorers import Explorers
from rlpost.frontier import Frontier
from rlpost.metrics import Metrics
from rlpost.packing import Packer
from rlpost.recipe import ExploreBudget, Recipe, SamplingRecipe
from rlpost.reward_recipe import bind_rewards
from rlpost.rollouts import gather, next_wave
from rlpost.run import make_pipeline
from rlpost.types import Request, Sampling, Task
from rlpost.world import World as RealWorld

ROWS = {"mixed": (1.0, 0.0), "solved": (1.0, 1.0), "hopeless": (0.0, 0.0)}


class World:
    """One rank, or one of two whose other rank found groups with these ids."""

    rank, size, is_main = 0, 1, True

    def __init__(self, others=()):
        self.others = list(others)
        self.size = 1 + bool(others)

    together = RealWorld.together

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
        self.wakes, self.greedy, self.asked = 0, 0, []

    @contextmanager
    def awake(self, engine, version):
        self.wakes += 1
        yield

    def generate(self, requests, sampling, whole=None):
        return [self.answer(one, i, sampling) for one in requests for i in range(one.n)]

    def answer(self, one, i, sampling):
        self.greedy += sampling.temperature == 0
        text = "0.75" if sampling.temperature == 0 else str(ROWS[one.hint or one.task.answer][i % 2])
        self.asked.append(one)
        return one.rollout((2, 3), (-1.0, -1.0), finish_reason="stop", version=0, text=text)


def said(rollout):
    """The number in the answer, as a reward."""
    return math.nan if rollout.text == "bad" else float(rollout.text)


def make_run(*kinds, prompts=4, world=None, explorers=(), budget=None, **algorithm):
    world = world or World()
    recipe = Recipe(
        explore_budget=budget or ExploreBudget(),
        prompts_per_step=prompts,
        sampling=SamplingRecipe(group_size=2, max_new_tokens=8),
        algorithm=Algorithm(**algorithm),
        rewards=[{"use": "test_rollouts:said", "isolate": False}],
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
        samples=SimpleNamespace(choose=lambda groups: None),
        chosen=SimpleNamespace(observe=lambda outcomes: None, write=lambda step: None),
        explorers=explorers_of(*explorers),
        frontier=Frontier(),
        pipeline=make_pipeline(recipe.generator, in_threads=False),
        next_group=0,
        task_keys=None,
    )


def explorers_of(*explorers):
    """Explorers that are made already."""
    whole = Explorers([], {"sampling": Sampling(max_new_tokens=8)}, context=64)
    whole.every, whole.names = list(explorers), [type(one).__name__ for one in explorers]
    return whole


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
        def generate(self, requests, sampling, whole=None):
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


class Wider:
    """Two more answers for groups of this kind, until they have `width`; says what it has heard."""

    def __init__(self, kind, width):
        self.kind, self.width, self.heard, self.steps = kind, width, [], []

    def begin(self, step, groups):
        self.steps.append((step, [group.id for group in groups]))

    def more(self, group):
        wanted = group.task.answer == self.kind and len(group.rollouts) < self.width
        return [group.request(2)] if wanted else []

    def observe(self, outcomes):
        self.heard += outcomes

    def metrics(self):
        return {"width": float(self.width)}


class Helper:
    """One answer under a hint that makes the first of two right, where all have failed; it replaces the group."""

    def more(self, group):
        if any(rollout.passed or rollout.level for rollout in group.rollouts):
            return []
        ids = (7, *group.prompt_ids)
        own = {"loss_prompt_ids": group.prompt_ids, "role": "guided", "hint": "mixed", "level": 1}
        return [Request(group.id, group.task, ids, 2, seed=group.seed + len(group.rollouts), **own)]

    def choose(self, group):
        guided = [rollout for rollout in group.rollouts if rollout.level]
        if guided:
            group.left_out += [rollout for rollout in group.rollouts if not rollout.level]
            group.rollouts = guided


def test_explorers_are_asked_until_nobody_wants_more():
    wider = Wider("mixed", 6)
    run = make_run("mixed", "solved", explorers=[wider], groups=Groups("keep"))
    groups = gather(run, 3)
    assert [len(group.rollouts) for group in groups] == [6, 2, 6, 2]
    assert wider.steps == [(3, [0, 1, 2, 3])] * 3
    seeds = [one.seed for one in run.generator.asked if one.group == 0]
    assert seeds == [groups[0].seed + i for i in (0, 0, 2, 2, 4, 4)]  # two answers a request
    assert [len(outcome.rewards) for outcome in wider.heard] == [6, 2, 6, 2]
    figures = run.metrics.reduce()
    assert (figures["explore/waves"], figures["explore/rollouts"], figures["rollouts/num"]) == (2, 8, 16)
    assert figures["rollouts/pass@1"] == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert figures["rollouts/pass@4"] == 1.0  # 3 of 6: no 4 without a right one; groups of 2 have no pass@4


def test_the_budget_ends_the_waves():
    run = make_run("mixed", explorers=[Wider("mixed", 100)], budget=ExploreBudget(waves=3))
    assert [len(group.rollouts) for group in gather(run, 0)] == [8] * 4
    run = make_run("mixed", explorers=[Wider("mixed", 100)], budget=ExploreBudget(rollouts=5))
    assert [len(group.rollouts) for group in gather(run, 0)] == [4, 4, 3, 2]


def test_a_later_explorer_is_asked_once_the_earlier_ones_have_what_they_want():
    run = make_run("hopeless", prompts=1, explorers=[Wider("hopeless", 4), Helper()])
    [group] = gather(run, 0)
    assert [(one.n, one.role) for one in run.generator.asked[::2]] == [(2, "policy"), (2, "policy"), (2, "guided")]
    assert [rollout.role for rollout in group.rollouts] == ["guided", "guided"] and len(group.left_out) == 4


def test_help_is_told_from_what_the_policy_can_do_alone():
    run = make_run("hopeless", prompts=1, explorers=[Helper()])
    [group] = gather(run, 0)
    assert [(one.prompt_ids, one.sampled_prompt_ids, one.off_policy) for one in group.rollouts] == [
        ((1,), (7, 1), True)
    ] * 2
    [heard] = run.curriculum.observed
    assert (heard.rewards, heard.passed, heard.hinted) == ((0.0, 0.0), (False, False), ((1, True), (1, False)))
    assert run.frontier.failures == {"t0": 2}
    figures = run.metrics.reduce()
    assert figures["reward/mean"] == 0.0 == figures["rollouts/pass@2"]
    assert (figures["guided/num"], figures["guided/solved_frac"], figures["guided/solved_frac/level_1"]) == (
        2,
        0.5,
        0.5,
    )
    assert figures["guided/trained_frac"] == 1.0
    assert (figures["rollouts/num"], figures["rollouts/discarded"], figures["tokens/generated"]) == (2, 2, 8)


def test_a_task_that_had_failed_in_every_try_is_counted_once_when_it_is_solved():
    run = make_run("hopeless", prompts=1)
    run.curriculum.select = lambda n: [Task("t", run.kind, answer=run.kind)]
    found = []
    for step, run.kind in enumerate(("hopeless", "mixed", "hopeless", "mixed")):
        gather(run, step)
        found.append(run.metrics.reduce()["explore/newly_solved"])
    assert found == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda group: 1 / 0, "explore.0: `Bad` raised ZeroDivisionError"),
        (lambda group: ["more"], "must ask for rollouts with requests"),
        (lambda group: [Request(group.id + 1, group.task, (1,), 2, 0)], "of the group that it was shown"),
        (lambda group: [Request(group.id, group.task, (1,) * 60, 2, 0)], "leaves room for the answer"),
    ],
)
def test_an_explorer_that_fails_stops_every_rank_with_its_message(answer, words):
    class Bad:
        def more(self, group):
            return answer(group)

    with pytest.raises(SharedError, match=words):
        gather(make_run("mixed", explorers=[Bad()]), 0)


def test_explorers_keep_their_state_by_their_place():
    class Stateful(Wider):
        def state_dict(self):
            return {"heard": len(self.heard)}

        def load_state_dict(self, state):
            self.heard = [None] * state["heard"]

    one, other = Stateful("mixed", 4), Stateful("mixed", 4)
    one.heard = [1, 2, 3]
    saved = explorers_of(Helper(), one).state_dict()
    assert saved == {"1": {"heard": 3}}
    explorers_of(Helper(), other).load_state_dict(saved)
    assert len(other.heard) == 3
    assert explorers_of(one, other).metrics() == {"width": 4.0, "width_1": 4.0}
