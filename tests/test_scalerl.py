"""The curriculum of ScaleRL: what has been learnt leaves for good, and a run never stalls."""

import json
import logging

import pytest

from curricula.scalerl import Scalerl
from curricula.uniform import Uniform
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(str(i), f"{i}+1=") for i in range(10)]


def keys(tasks):
    return [task.key for task in tasks]


def outcome(key, passed, judged=10, step=0):
    """`passed` of `judged` rollouts solved the task."""
    flags = (True,) * passed + (False,) * (judged - passed)
    return Outcome(str(key), tuple(float(flag) for flag in flags), step, flags)


def solved(*numbers):
    return [outcome(number, 10) for number in numbers]


def test_scalerl_is_uniform_until_something_is_solved():
    curriculum, uniform = Scalerl(TASKS, seed=3), Uniform(TASKS, seed=3)
    for _ in range(5):
        assert curriculum.select(4) == uniform.select(4)
        curriculum.observe([outcome(i, 8) for i in range(10)])
    assert curriculum.metrics() == {"epoch": 2.0, "retired": 0.0, "left": 10.0}


def test_scalerl_lets_a_task_leave_when_its_share_of_passes_reaches_the_threshold():
    curriculum = Scalerl(TASKS, seed=0)
    curriculum.observe([outcome(1, 9), outcome(2, 8), outcome(3, 10)])
    assert curriculum.metrics() == {"epoch": 0.0, "retired": 2.0, "left": 8.0}
    drawn = [key for _ in range(10) for key in keys(curriculum.select(4))]
    assert {key: drawn.count(key) for key in set(drawn)} == dict.fromkeys("02456789", 5)  # the others: equally often


def test_scalerl_counts_over_all_times_that_a_task_was_seen():
    curriculum = Scalerl(TASKS, seed=0)
    curriculum.observe([outcome(1, 0), outcome(2, 8)])
    curriculum.observe([outcome(1, 10), outcome(2, 10)])  # 10 of 20, and 18 of 20
    assert list(curriculum.retired) == ["2"]
    for _ in range(8):
        curriculum.observe([outcome(1, 10)])
    assert list(curriculum.retired) == ["2", "1"]  # 90 of 100


def test_scalerl_judges_by_what_passed_and_leaves_out_what_could_not_be_judged():
    curriculum = Scalerl(TASKS, seed=0)
    curriculum.observe(
        [
            Outcome("1", (1.5, None, 1.5), 0, (True, None, True)),
            Outcome("2", (None, None), 0, (None, None)),
            Outcome("3", (1.5, 1.5), 0, (False, False)),  # a bonus is no pass
        ]
    )
    assert list(curriculum.retired) == ["1"]
    assert (curriculum.passed, curriculum.judged) == ({"1": 2, "3": 0}, {"1": 2, "3": 2})


def test_scalerl_does_not_take_a_task_back_that_has_left():
    curriculum = Scalerl(TASKS, seed=0)
    curriculum.observe(solved(1))
    curriculum.observe([outcome(1, 0)])
    assert all("1" not in keys(curriculum.select(6)) for _ in range(5))


def test_scalerl_fills_a_step_up_with_the_least_solved_and_says_so_once(caplog):
    curriculum = Scalerl(TASKS, seed=0)
    curriculum.observe([*solved(0, 1, 2, 3, 4, 5), outcome(6, 19, 20), outcome(7, 9)])
    with caplog.at_level(logging.WARNING):
        assert sorted(keys(curriculum.select(4))) == ["6", "7", "8", "9"]
        assert set(keys(curriculum.select(3))) <= {"7", "8", "9"}
    assert caplog.messages == [
        "curriculum: 8 of 10 tasks are solved, fewer than the 4 of a step are left: it is filled up with the least "
        "solved of the others; give more tasks, or raise curriculum.threshold"
    ]


def test_scalerl_goes_on_when_everything_is_solved():
    curriculum = Scalerl(TASKS, seed=0)
    curriculum.observe(solved(*range(10)))
    assert len(curriculum.select(25)) == 25
    assert len(curriculum.select(5)) == 5
    assert curriculum.metrics()["left"] == 0.0


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_scalerl_resumes_exactly(steps):
    def go_on(curriculum, count):
        drawn = []
        for step in range(count):
            drawn.append(keys(curriculum.select(4)))
            curriculum.observe([outcome(key, 9 + (int(key) + step) % 2, step=step) for key in drawn[-1][:2]])
        return drawn

    whole = Scalerl(TASKS, seed=5)
    go_on(whole, steps)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = Scalerl(TASKS, seed=99)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == whole.state_dict() == state
    assert go_on(resumed, 6) == go_on(whole, 6)
    assert resumed.state_dict() == whole.state_dict()


def test_scalerl_refuses_the_state_of_other_tasks():
    state = Scalerl(TASKS, seed=0).state_dict()
    with pytest.raises(RunError, match=r"tasks\.train must be what the checkpoint was trained on"):
        Scalerl(TASKS[:9], seed=0).load_state_dict(state)


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_scalerl_refuses_a_threshold_that_nothing_or_everything_reaches(threshold):
    with pytest.raises(RunError, match=r"curriculum\.threshold must be in \(0, 1\]"):
        Scalerl(TASKS, seed=0, threshold=threshold)
