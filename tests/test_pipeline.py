"""Waves ahead of their step: who is trained when, how old it is, what is saved, and what happens where one fails."""

import json
import math
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from lab import rlpost, train
from test_rollouts import Generator, kinds_of, make_run

from rlpost.errors import RunError, SharedError
from rlpost.pipeline import Pipeline, Wave, dealt
from rlpost.rollouts import gather
from rlpost.run import make_pipeline
from rlpost.saved_groups import group_of, saved
from rlpost.types import Group, Rollout, Task


class Servers(Generator):
    """Answers in threads; a task's answer waits until it is let go."""

    concurrent = True

    def __init__(self):
        super().__init__()
        self.gates = {}
        self.version = 0

    def let_go(self, *groups):
        for group in groups:
            self.gates.setdefault(group, threading.Event()).set()

    def generate(self, requests, sampling, whole=None):
        left, found = {one.group: one for one in requests}, {}
        deadline = time.monotonic() + 30
        while left:
            for group in [group for group in left if self.gates.setdefault(group, threading.Event()).is_set()]:
                one = left.pop(group)
                answers = [replace(self.answer(one, i, sampling), version=self.version) for i in range(one.n)]
                found[group] = answers
                whole(answers)
            assert time.monotonic() < deadline, f"nobody let {sorted(left)} go"
            time.sleep(0.005)
        return [rollout for one in requests for rollout in found[one.group]]


def ahead(run, *, k, servers=True, **generator):
    run.recipe.generator = replace(run.recipe.generator, max_staleness=k, **generator)
    run.recipe.steps = 6
    if servers:
        run.generator = Servers()
    run.pipeline = make_pipeline(run.recipe.generator, in_threads=servers)
    run.counts = []
    return run


def ids(groups):
    return [group.id for group in groups]


def test_waves_are_begun_ahead_and_trained_in_their_order():
    run = ahead(make_run("mixed", prompts=2), k=2)
    run.generator.let_go(*range(12))
    trained = []
    for step in range(6):
        run.engine.updates = run.generator.version = step
        groups = gather(run, step)
        trained.append(ids(groups))
        assert [group.begun for group in groups] == [max(0, step - 2)] * 2
    assert trained == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert run.curriculum.taken == 12 and run.pipeline.waves == [] and run.pipeline.written == {}
    assert [outcome.step for outcome in run.curriculum.observed] == [step for step in range(6) for _ in range(2)]
    run.pipeline.close()


def test_a_later_wave_is_written_while_its_step_has_not_come():
    run = ahead(make_run("mixed", prompts=2), k=1)
    run.generator.let_go(0, 1, 2, 3)
    gather(run, 0)
    until = time.monotonic() + 10
    while len(run.pipeline.written) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(run.pipeline.written) == [2, 3]
    run.pipeline.close()


def test_in_order_a_long_answer_is_waited_for():
    run = ahead(make_run("mixed", prompts=2), k=2)
    run.generator.let_go(1, *range(2, 12))
    threading.Timer(0.3, run.generator.let_go, [0]).start()
    assert ids(gather(run, 0)) == [0, 1]
    run.pipeline.close()


def test_first_come_a_long_answer_is_not_waited_for():
    run = ahead(make_run("mixed", prompts=2), k=2, first_come=True)
    run.generator.let_go(1, 2)
    assert ids(gather(run, 0)) == [1, 2]
    run.generator.let_go(*range(12))
    run.pipeline.close()


def test_first_come_trains_each_group_once_and_none_later_than_the_bound():
    run = ahead(make_run("mixed", prompts=2), k=2, first_come=True)
    run.generator.let_go(*(group for group in range(12) if group not in (4, 6)))
    trained, waited = [], []
    for step in range(6):
        if step in (3, 4):  # the last moment of group 4, then of group 6: the step waits for it
            threading.Timer(0.2, run.generator.let_go, [4 if step == 3 else 6]).start()
        run.engine.updates = step
        run.generator.version = step
        groups = gather(run, step)
        trained.append(ids(groups))
        waited += [step - group.begun for group in groups]
    assert sorted(id for step in trained for id in step) == list(range(12))
    assert max(waited) <= 2 and [len(step) for step in trained] == [2] * 6
    assert 4 in trained[3] and 6 in trained[4], "they were to come later than groups that were begun after them"
    run.pipeline.close()


def test_what_fails_in_a_thread_is_the_runs_error():
    run = ahead(make_run("mixed", prompts=2), k=1)

    def fail(requests, sampling, whole=None):
        raise RunError("generator: the servers are gone")

    run.generator.generate = fail
    with pytest.raises(SharedError, match="the servers are gone"):
        gather(run, 0)
    run.pipeline.close()


def test_weights_that_are_older_than_the_wave_stop_the_run():
    run = ahead(make_run("mixed", prompts=2), k=1)
    run.generator.let_go(*range(12))
    gather(run, 0)
    run.engine.updates = 3  # the generator goes on with version 0
    gather(run, 1)
    with pytest.raises(SharedError, match="begun at version 3, and version 0 wrote of it"):
        gather(run, 2)
    run.pipeline.close()


def test_a_step_that_is_undone_leaves_what_was_on_its_way_and_forgets_what_it_began():
    run = ahead(make_run("mixed", prompts=2), k=1, servers=False)
    gather(run, 0)
    before = run.pipeline.state_dict(run.world)
    run.pipeline.begin_step()
    gather(run, 1)
    assert run.pipeline.state_dict(run.world) != before
    run.pipeline.undo()
    assert run.pipeline.state_dict(run.world) == before


def test_the_pipeline_goes_on_from_its_state_and_asks_again_for_what_was_not_whole():
    run = ahead(make_run("mixed", prompts=2), k=2)
    run.generator.let_go(0, 1, 2)  # of wave 1 one group is whole, of wave 2 none
    gather(run, 0)
    until = time.monotonic() + 10
    while len(run.pipeline.written) < 1 and time.monotonic() < until:
        time.sleep(0.01)
    state = json.loads(json.dumps(run.pipeline.state_dict(run.world)))
    other = ahead(make_run("mixed", prompts=2), k=2)
    other.pipeline.load_state_dict(state, other.world)
    other.next_group, other.curriculum.taken = run.next_group, run.curriculum.taken
    other.generator.let_go(*range(12))
    assert [ids(gather(other, step)) for step in range(1, 6)] == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert 2 not in {request.group for request in other.generator.asked} and other.curriculum.taken == 12
    run.generator.let_go(*range(12))
    run.pipeline.close()
    other.pipeline.close()


def test_a_saved_group_comes_back_bit_for_bit():
    task = Task("a", [{"role": "user", "content": "1+1="}], answer="2", hints=("x",), extra={"terms": 2}, source="f")
    rollout = Rollout(
        task,
        7,
        prompt_ids=(5, 6),
        sampled_prompt_ids=(5, 6, 9),
        token_ids=(70000, 1),
        behavior_logp=(-0.1, math.nan),
        finish_reason="repetition",
        version=3,
        later_versions=((1, 4),),
        text="é2",
        role="guided",
        hint="x",
        level=1,
        interrupted=True,
    )
    group = Group(7, task, [rollout], prompt_ids=(5, 6), seed=11, begun=2, version=3)
    again = group_of(json.loads(json.dumps(saved(group, group.rollouts))))
    assert repr(again) == repr(group)  # NaN is not equal to itself


def test_other_ranks_share_what_was_on_its_way():
    def state(*ids):
        groups = [saved(Group(id, Task(str(id), ""), []), []) for id in ids]
        return {
            "waves": [{"step": 3, "due": 3, "size": len(ids), "groups": groups[1:], "greedy": []}],
            "held": groups[:1],
        }

    ranks = [state(0, 1, 2), state(3, 4, 5)]
    for size in (1, 3, 4):
        shares = [dealt(ranks, SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
        waves = [one["id"] for share in shares for one in share["waves"][0]["groups"]]
        assert waves == [1, 2, 4, 5] and [one["id"] for share in shares for one in share["held"]] == [0, 3]
        assert sum(share["waves"][0]["size"] for share in shares) == 6


def test_without_staleness_nothing_is_on_its_way_between_steps():
    run = make_run("mixed", prompts=2)
    assert kinds_of(gather(run, 0)) == ["mixed", "mixed"]
    assert run.pipeline.state_dict(run.world) == {} and not run.pipeline.waves


def test_a_group_that_was_trained_early_is_not_written_again():
    pipeline = Pipeline(ahead=1, first_come=True, partial=False, in_threads=False)
    early, late = Group(0, Task("a", ""), []), Group(1, Task("b", ""), [])
    rollout = Rollout(early.task, 0, (), (), (), (), "stop", 0)

    def write(wave, groups, whole):
        whole([rollout])
        whole([replace(rollout, text="again")])
        whole([replace(rollout, group=1)])

    pipeline.start(Wave(0, 0, [early, late]), write)
    groups, _ = pipeline.take(0)
    assert ids(groups) == [0, 1] and [one.text for one in groups[0].rollouts] == [""]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["generator.max_staleness=2", "generator.partial_tokens=12"])
def test_a_killed_run_with_rollouts_on_their_way_resumes_exactly(lab, mode):
    shared = ["generator.kind=hf", "tasks.eval=null", "steps=5", "save_in_background=false", mode]
    name = mode.partition("=")[0].rpartition(".")[2]
    whole = train(lab, f"whole-{name}", *shared)
    checkpoint = lab / f"runs/killed-{name}/checkpoints/step-000002"
    killed = rlpost(lab, "train", f"name=killed-{name}", *shared, accident=f"SIGKILL:{checkpoint}")
    assert killed.returncode == -signal.SIGKILL
    assert train(lab, f"killed-{name}", *shared, "resume=auto") == whole and len(whole) == 5
    if name == "max_staleness":
        assert [row["pipeline/age_max"] for row in whole] == [0, 1, 2, 2, 2]
        assert [row["pipeline/waiting"] for row in whole] == [8, 8, 8, 4, 0]
        ages = {name.split("/")[1] for row in whole for name in row if name.startswith("mismatch/age_")}
        assert ages & {"age_1", "age_2"}, ages
    else:
        assert max(row["pipeline/held"] for row in whole) > 0
        assert max(row["pipeline/several_versions_frac"] for row in whole if "reward/mean" in row) > 0
