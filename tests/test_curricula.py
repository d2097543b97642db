import json
import random

import pytest

from curricula.uniform import Uniform
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(str(i), f"{i}+1=") for i in range(10)]


def keys(tasks):
    return [task.key for task in tasks]


def test_uniform_gives_every_task_once_an_epoch():
    curriculum = Uniform(TASKS, seed=0)
    drawn = keys(curriculum.select(4) + curriculum.select(4) + curriculum.select(12))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(keys(TASKS))
    assert drawn[:10] != drawn[10:]


def test_uniform_follows_from_its_seed_alone():
    random.seed(1)
    one = Uniform(TASKS, seed=3).select(25)
    random.seed(2)
    assert Uniform(TASKS, seed=3).select(25) == one
    assert Uniform(TASKS, seed=4).select(25) != one


def test_uniform_selects_more_than_the_data_set_holds():
    curriculum = Uniform(TASKS[:3], seed=0)
    assert len(curriculum.select(8)) == 8
    assert curriculum.metrics() == {"epoch": 8 / 3}


@pytest.mark.parametrize("taken", [0, 7, 10, 23])
def test_uniform_resumes_exactly(taken):
    whole = Uniform(TASKS, seed=5)
    whole.select(taken)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = Uniform(TASKS, seed=99)
    resumed.load_state_dict(state)
    assert resumed.select(17) == whole.select(17)
    assert resumed.state_dict() == whole.state_dict()


def test_uniform_does_not_depend_on_outcomes():
    curriculum = Uniform(TASKS, seed=0)
    curriculum.observe([Outcome("1", (1.0, 0.0), 0)])
    assert curriculum.select(5) == Uniform(TASKS, seed=0).select(5)


def test_uniform_refuses_the_state_of_other_tasks():
    state = Uniform(TASKS, seed=0).state_dict()
    with pytest.raises(RunError, match=r"tasks\.train must be what the checkpoint was trained on"):
        Uniform(TASKS[:9], seed=0).load_state_dict(state)
