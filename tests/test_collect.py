import math

import pytest

from rlpost.algorithm_recipe import Interruption
from rlpost.collect import collect, request_seed, shard
from rlpost.types import Rollout, Sampling, Task

TASKS = [Task(f"t{i}", "x" * i) for i in range(7)]


class Renderer:
    def prompt_ids(self, task):
        return (len(task.prompt),)


class Generator:
    """Answers in the wrong order, as a server may."""

    def __init__(self):
        self.requests = []

    def generate(self, requests, sampling, whole=None):
        self.requests = list(requests)
        return [
            Rollout(one.task, one.group, one.prompt_ids, one.prompt_ids, (i,), (-1.0,), "stop", 0)
            for i in range(2)
            for one in reversed(requests)
        ]


def ask(generator, tasks, first_group=20, seed=3):
    settings = {"group_size": 2, "first_group": first_group, "seed": seed}
    return collect(generator, Renderer(), tasks, Sampling(max_new_tokens=4), **settings)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_shards_hold_every_task_once_in_order_and_differ_by_at_most_one(size):
    shards = [shard(TASKS, rank, size) for rank in range(size)]
    assert [pair for part in shards for pair in part] == list(enumerate(TASKS))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_groups_are_told_apart_by_their_number_not_their_prompt():
    same = [(4, Task("a", "xx")), (5, Task("b", "xx"))]
    groups = ask(Generator(), same)
    assert [(group.id, group.task.key) for group in groups] == [(24, "a"), (25, "b")]
    for group in groups:
        assert [rollout.token_ids for rollout in group.rollouts] == [(0,), (1,)]
        assert all(rollout.group == group.id and rollout.task is group.task for rollout in group.rollouts)


def test_requests_and_seeds_do_not_depend_on_the_number_of_ranks():
    alone = Generator()
    ask(alone, shard(TASKS, 0, 1))
    shared = []
    for rank in range(3):
        generator = Generator()
        ask(generator, shard(TASKS, rank, 3))
        shared += generator.requests
    assert shared == alone.requests
    assert len({request.seed for request in shared}) == len(TASKS)


def test_request_seed_belongs_to_run_and_group():
    seeds = {request_seed(seed, group) for seed in range(50) for group in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1, 2) == request_seed(1, 2)


class Thinker:
    """Thinks up to the limit, ends at 9 when it is asked for an answer, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling, whole=None):
        self.asked.append((list(requests), sampling))
        first = len(self.asked) == 1
        return [self.answer(one, i, first) for one in requests for i in range(one.n)]

    def answer(self, one, i, first):
        cut = first and i == 1
        ids, reason = ((4, 5), "length") if cut else ((6, 9), "stop")
        return Rollout(one.task, one.group, one.prompt_ids, one.prompt_ids, ids, (-1.0, -2.0), reason, 0, text=f"{ids}")


class Words(Renderer):
    def text_ids(self, text):
        return tuple(map(ord, text))

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_an_interrupted_answer_goes_on_after_text_that_is_not_trained():
    thinker = Thinker()
    asked = Interruption(text="!", answer_tokens=3)
    groups = collect(
        thinker,
        Words(),
        shard(TASKS[:2], 0, 1),
        Sampling(max_new_tokens=2, stop_ids=(9,)),
        group_size=2,
        first_group=5,
        seed=3,
        interruption=asked,
    )
    second, sampling = thinker.asked[1]
    assert [(one.prompt_ids, one.n) for one in second] == [((0, 4, 5, 33), 1), ((1, 4, 5, 33), 1)]
    assert sampling == Sampling(max_new_tokens=3, stop_ids=(9,)) and len({one.seed for one in second}) == 2
    for place, group in enumerate(groups):
        whole, cut = group.rollouts
        assert (whole.token_ids, whole.interrupted) == ((6, 9), False)
        assert cut.token_ids == (4, 5, 33, 6, 9) and cut.prompt_ids == (place,) and cut.group == group.id == 5 + place
        assert cut.behavior_logp[:2] == cut.behavior_logp[3:] == (-1.0, -2.0) and math.isnan(cut.behavior_logp[2])
        assert (cut.finish_reason, cut.interrupted, cut.text) == ("stop", True, "4 5 33 6 9")


def test_nothing_is_interrupted_unless_the_recipe_has_a_text():
    thinker = Thinker()
    settings = {"group_size": 2, "first_group": 0, "seed": 0, "interruption": Interruption()}
    [group] = collect(thinker, Words(), shard(TASKS[:1], 0, 1), Sampling(2), **settings)
    assert len(thinker.asked) == 1 and [one.truncated for one in group.rollouts] == [False, True]
