"""Partial rollouts: so many tokens a step, continued behind the very tokens, each with its version and log-prob."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_rollouts import make_run

from rlpost.algorithm_recipe import Groups
from rlpost.partial import is_unfinished, joined, write_part
from rlpost.rollouts import gather
from rlpost.run import make_pipeline
from rlpost.types import Group, Request, Sampling, Task

RENDERER = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), prompt_ids=lambda task: (1,))


class Counting:
    """Answers with the numbers from the prompt's length on, up to a task's length; log-prob -n of a token n."""

    def __init__(self, version=0):
        self.version, self.asked = version, []

    @contextmanager
    def awake(self, engine, version):
        self.version = version
        yield

    def generate(self, requests, sampling, whole=None):
        self.asked.append(list(requests))
        found = []
        for one in requests:
            for _ in range(one.n):
                start = len(one.prompt_ids)
                end = min(int(one.task.answer) + 1, start + one.max_new_tokens(sampling))
                ids = tuple(range(start, end))
                reason = "stop" if end == int(one.task.answer) + 1 else "length"
                logp = tuple(-float(id) for id in ids)
                found.append(one.rollout(ids, logp, finish_reason=reason, version=self.version, text="0.5"))
        return found


def write(group, generator, *, tokens=4, sampling=None):
    return write_part([group], generator, RENDERER, sampling or Sampling(10), group_size=2, tokens=tokens)


def test_an_answer_goes_on_behind_its_own_tokens_until_it_ends():
    group, generator = Group(3, Task("a", "", answer="9"), [], prompt_ids=(7,), seed=5), Counting()
    assert write(group, generator) == [group]
    assert [one.token_ids for one in group.rollouts] == [(1, 2, 3, 4)] * 2
    generator.version = 6
    assert write(group, generator) == [group]
    generator.version = 8
    assert write(group, generator) == []
    for rollout in group.rollouts:
        assert rollout.token_ids == tuple(range(1, 10)) and rollout.finish_reason == "stop"
        assert rollout.behavior_logp == tuple(-float(id) for id in range(1, 10))
        assert rollout.versions == ((0, 0), (4, 6), (8, 8)) and rollout.text == "1 2 3 4 5 6 7 8 9"
        assert rollout.prompt_ids == rollout.sampled_prompt_ids == (7,)
    assert [[one.n for one in call] for call in generator.asked] == [[2], [1, 1], [1, 1]]
    seeds = [one.seed for call in generator.asked for one in call]
    assert len(set(seeds)) == len(seeds), "no two parts are drawn with the same numbers"
    assert [one.limit for one in generator.asked[2]] == [2, 2], "8 of 10 tokens are there"


def test_the_limit_of_the_sampling_ends_an_answer_as_truncated():
    group, generator = Group(3, Task("a", "", answer="99"), [], prompt_ids=(7,)), Counting()
    for unfinished in (True, True, False):
        assert bool(write(group, generator)) == unfinished
    assert {(len(one.token_ids), one.finish_reason, one.truncated) for one in group.rollouts} == {(10, "length", True)}


def test_circles_across_parts_end_an_answer():
    request = Request(0, Task("a", ""), (7,), 1, 0)
    begun = request.rollout((4, 5, 4), (-1.0,) * 3, finish_reason="length", version=0, text="")
    end = request.rollout((5, 4, 5), (-1.0,) * 3, finish_reason="length", version=0, text="")
    generator = SimpleNamespace(generate=lambda requests, sampling: [end])
    group = Group(0, request.task, [begun])
    sampling = Sampling(10, repeats=(3, 2))
    assert is_unfinished(begun, sampling)
    assert write_part([group], generator, RENDERER, sampling, group_size=1, tokens=3) == []
    [rollout] = group.rollouts
    assert (rollout.finish_reason, rollout.truncated, rollout.later_versions) == ("repetition", True, ())


def test_spans_of_several_versions_within_one_part_stay_where_they_are():
    request = Request(0, Task("a", ""), (7,), 1, 0)
    begun = request.rollout((4, 5), (-1.0,) * 2, finish_reason="length", version=((0, 1), (1, 2)), text="")
    same = request.rollout((6, 7), (-1.0,) * 2, finish_reason="stop", version=((0, 2), (1, 3)), text="")
    assert joined(begun, same, RENDERER).versions == ((0, 1), (1, 2), (3, 3))
    other = replace(same, version=5)
    assert joined(begun, other, RENDERER).versions == ((0, 1), (1, 2), (2, 5), (3, 3))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_step_trains_what_is_whole_and_each_task_once(parts):
    run = make_run("3", "9", "5", "3", prompts=4, groups=Groups(without_spread="keep"))
    run.recipe.generator = replace(run.recipe.generator, partial_tokens=4)
    run.renderer = SimpleNamespace(prompt_ids=lambda task: (1,), decode=lambda ids: "1.0")
    run.sampling, run.generator = Sampling(10), Counting()
    run.pipeline = make_pipeline(run.recipe.generator, in_threads=False)
    seen, held = [], []
    for step in range(3 * parts):
        run.engine.updates = step
        seen += [(group.task.key, len(group.rollouts[0].token_ids), step - group.begun) for group in gather(run, step)]
        held.append(len(run.pipeline.held))
        assert run.curriculum.taken == len(seen) + held[-1], "as many are on their way as were chosen and not trained"
    assert len({key for key, *_ in seen}) == len(seen) and max(held) > 0
    assert all((length - 1) // 4 == waited for _, length, waited in seen)
