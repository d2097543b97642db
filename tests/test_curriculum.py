"""The loop and a curriculum: faulty choices end in one message on every rank, measurements and corrections arrive."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from test_rollouts import make_run

from curricula.adcl import Adcl
from curricula.learnable import Learnable
from curricula.scalerl import Scalerl
from curricula.uniform import Uniform
from rlpost.algorithm_recipe import Groups
from rlpost.curriculum import check_choice, choice, corrected
from rlpost.document import Document
from rlpost.errors import RunError, SharedError
from rlpost.rollouts import gather
from rlpost.types import Group, Task

TASKS = [Task(f"t{i}", kind, answer=kind) for i, kind in enumerate(["mixed", "solved", "hopeless", "mixed"] * 5)]
KEYS = frozenset(task.key for task in TASKS)
ALONE = SimpleNamespace(rank=0, size=1, all_gather_object=lambda item: [item])


class Faulty:
    """Gives what it was told to."""

    def __init__(self, tasks):
        self.tasks = tasks

    def select(self, n):
        return self.tasks


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (TASKS[:3], r"must return as many tasks as it is asked for \(got 3 of 4\)"),
        (TASKS[:5], r"must return as many tasks as it is asked for \(got 5 of 4\)"),
        ([*TASKS[:3], Task("x9", "?")], r"must return tasks that it was given \(got x9\): those of tasks\.train"),
        (["t0", "t1", "t2", "t3"], r"must return a list of Task \(it has 't0'\): return the tasks .* not their keys"),
        (None, r"must return a list of Task \(got NoneType\)"),
        ((task for task in TASKS), r"must return a list of Task \(got generator\)"),
    ],
)
def test_a_faulty_choice_is_one_clear_error(tasks, message):
    run = SimpleNamespace(curriculum=Faulty(tasks), task_keys=KEYS, world=ALONE)
    with pytest.raises(SharedError, match=r"^curriculum\.use: `select` of Faulty " + message):
        choice(run, 4)


def test_a_faulty_choice_stops_a_step_before_anything_is_generated():
    run = make_run("mixed")
    run.curriculum = Faulty(TASKS[:3])
    with pytest.raises(RunError, match=r"got 3 of 4"):
        gather(run, 0)
    assert run.next_group == 0


def test_tasks_that_were_added_may_be_chosen():
    curriculum = Uniform(TASKS, seed=0)
    curriculum.add([Task("new", "1+1=")])
    check_choice([Task("new", "1+1=")], 1, curriculum, KEYS, ALONE)
    with pytest.raises(RunError, match="got other"):
        check_choice([Task("other", "1+1=")], 1, curriculum, KEYS, ALONE)


def on_ranks(choices, size=4):
    """What each rank raises, or None; every rank makes one collective, whatever it found."""
    items, meet = [None] * len(choices), threading.Barrier(len(choices))

    def gather_object(rank):
        def all_gather_object(item):
            items[rank] = item
            meet.wait(timeout=5)
            return list(items)

        return all_gather_object

    def check(rank):
        world = SimpleNamespace(rank=rank, size=len(choices), all_gather_object=gather_object(rank))
        try:
            check_choice(choices[rank], size, Faulty(None), KEYS, world)
        except SharedError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(choices)) as pool:
        return list(pool.map(check, range(len(choices))))


def test_ranks_that_differ_all_say_so():
    other = random.Random(1).sample(TASKS, 4)
    first, second = on_ranks([TASKS[:4], other])
    assert first == second and "the same tasks on every rank, and the ranks differ" in first
    assert on_ranks([TASKS[:4], TASKS[:4]]) == [None, None]


def test_a_fault_of_one_rank_is_told_on_all():
    first, second, third = on_ranks([TASKS[:4], TASKS[:2], TASKS[:4]])
    assert first == second == third and "got 2 of 4" in first


def with_curriculum(kind, groups="keep", **parameters):
    run = make_run("mixed", groups=Groups(groups))
    run.curriculum, run.task_keys = kind(TASKS, seed=0, **parameters), KEYS
    return run


def test_measured_answers_are_observed_counted_and_not_trained_on():
    run = with_curriculum(Adcl, measure_tries=2, batches=4)
    groups = gather(run, 0)
    assert len(groups) == 4 and [group.id for group in groups] == [20, 21, 22, 23]
    assert all(group.task.answer == "solved" for group in groups)  # the easiest
    figures = run.metrics.reduce()
    assert (figures["rollouts/measured"], figures["tokens/measured"], figures["rollouts/num"]) == (40, 80, 8)
    assert (run.curriculum.seen_at >= 0).all() and run.next_group == 24
    assert "time/measure_s" in run.clock.lap()
    assert run.curriculum.drawn.sum() == 4
    gather(run, 1)  # reaches into the second super-batch
    assert run.metrics.reduce()["rollouts/measured"] == 10 and run.curriculum.measured == 2


def test_measurements_that_ranks_do_not_agree_on_stop_the_run():
    run = with_curriculum(Adcl)
    run.curriculum.wants_measured = lambda: ["t1"]
    with pytest.raises(SharedError, match="`wants_measured` of Adcl must return a list of Task"):
        gather(run, 0)


@pytest.mark.parametrize("kind", [Uniform, Scalerl, Learnable, Adcl])
def test_curricula_work_with_refill(kind):
    """Waves that throw groups away are learned from as well."""
    run = with_curriculum(kind, "refill")
    for step in range(3):
        assert [group.task.answer for group in gather(run, step)] == ["mixed"] * 4
    assert run.metrics.reduce()["rollouts/discarded"] > 0
    if kind is Learnable:
        tries = run.curriculum.passes + run.curriculum.fails
        assert any(tries[i] > 0 for i, task in enumerate(TASKS) if task.answer != "mixed")


def test_advantages_are_multiplied_by_what_a_task_counts():
    groups = [Group(3, TASKS[0], []), Group(4, TASKS[1], [])]
    documents = [Document((1,), (2,), (-1.0,), advantage=x, group=g) for x, g in ((1.0, 3), (-2.0, 3), (4.0, 4))]
    curriculum = SimpleNamespace(correction=lambda key: {"t0": 0.5, "t1": 3.0}[key])
    assert [one.advantage for one in corrected(documents, groups, curriculum)] == [0.5, -1.0, 12.0]
    assert corrected(documents, groups, Uniform(TASKS, seed=0)) == documents
