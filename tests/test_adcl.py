"""adcl: super-batches, what is measured before which, and the inversion rate against its definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from curricula.adcl import Adcl, inversion_rate
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(str(i), str(i), extra={"level": i}) for i in range(40)]


def measured(tasks, rate, tries=100, step=0):
    """Measured outcomes with a given pass rate of each task."""
    found = []
    for task in tasks:
        passes = round(rate(int(task.key)) * tries)
        found.append(Outcome(task.key, (), step, (True,) * passes + (False,) * (tries - passes), measured=True))
    return found


def numbers(tasks):
    return [int(task.key) for task in tasks]


@pytest.mark.parametrize("ties", [False, True])
def test_inversion_rate_is_the_share_of_flipped_pairs(ties):
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, 5, 30) / 4 if ties else rng.random(30) for _ in range(2))
    if not ties:  # far enough apart to be told from each other
        before, after = (np.argsort(np.argsort(x)) / 29 for x in (before, after))
    flipped = sum((before[i] - before[j]) * (after[i] - after[j]) < 0 for i, j in combinations(range(30), 2))
    assert inversion_rate(before, after) == pytest.approx(flipped / (30 * 29 / 2))
    assert inversion_rate(np.arange(9.0), -np.arange(9.0)) == 1.0
    assert inversion_rate(np.arange(9.0), np.arange(9.0)) == inversion_rate(np.ones(1), np.ones(1)) == 0.0


def test_adcl_measures_everything_first_and_each_batch_before_it_is_entered():
    curriculum = Adcl(TASKS, seed=0, batches=4)
    assert sorted(numbers(curriculum.wants_measured())) == list(range(40))
    curriculum.observe(measured(curriculum.wants_measured(), lambda i: 1 - i / 40))
    assert curriculum.wants_measured() == []
    assert numbers(curriculum.select(5)) == [0, 1, 2, 3, 4]
    assert curriculum.wants_measured() == []  # the next step ends with the batch
    assert numbers(curriculum.select(5)) == [5, 6, 7, 8, 9]
    wanted = curriculum.wants_measured()
    assert numbers(wanted) == list(range(10, 20))
    curriculum.observe(measured(wanted, lambda i: i / 40))  # turned round by what was learnt
    assert curriculum.metrics()["inversion_rate"] == 1.0 and curriculum.wants_measured() == []
    assert numbers(curriculum.select(5)) == [19, 18, 17, 16, 15]
    assert sorted(numbers(curriculum.select(5))) == [10, 11, 12, 13, 14]
    assert numbers(curriculum.wants_measured()) == list(range(20, 30))  # no task has changed its batch


def test_adcl_measures_a_batch_that_a_step_reaches_into():
    curriculum = Adcl(TASKS, seed=0, batches=4, difficulty="level")
    assert curriculum.wants_measured() == []
    curriculum.select(8)
    wanted = curriculum.wants_measured()
    assert numbers(wanted) == list(range(10, 20))
    curriculum.observe(measured(wanted, lambda i: i / 40))
    assert numbers(curriculum.select(8)) == [8, 9, 19, 18, 17, 16, 15, 14]


def test_adcl_static_is_the_same_without_measurements():
    curriculum = Adcl(TASKS, seed=0, batches=4, difficulty="level", static=True)
    chosen = []
    for _ in range(8):
        assert curriculum.wants_measured() == []
        chosen += numbers(curriculum.select(5))
    assert chosen == list(range(40)) and "inversion_rate" not in curriculum.metrics()


def test_adcl_begins_another_round_and_measures_its_first_batch():
    curriculum = Adcl(TASKS, seed=0, batches=2, difficulty="level")
    for _ in range(5):
        if wanted := curriculum.wants_measured():
            curriculum.observe(measured(wanted, lambda i: 1 - i / 40))
        curriculum.select(8)
    assert curriculum.position == 40
    wanted = curriculum.wants_measured()
    assert len(wanted) == 20 and curriculum.metrics()["round"] == 1


def test_adcl_draws_limit_a_round_to_a_random_part():
    curriculum = Adcl(TASKS, seed=0, batches=4, difficulty="level", draws=20, static=True)
    chosen = numbers(curriculum.select(20))
    assert chosen == sorted(chosen) and len(set(chosen)) == 20 and chosen != list(range(20))


def test_adcl_goes_on_where_nobody_measures():
    assert len(set(numbers(Adcl(TASKS, seed=0).select(40)))) == 40


def test_adcl_keeps_what_could_not_be_judged():
    curriculum = Adcl(TASKS, seed=0, difficulty="level")
    before = curriculum.delta.copy()
    curriculum.select(8)
    wanted = curriculum.wants_measured()
    curriculum.observe([Outcome(task.key, (None,), 0, (None,), measured=True) for task in wanted])
    assert (curriculum.delta == before).all() and curriculum.wants_measured() == []


@pytest.mark.parametrize("parameters", [{"batches": 0}, {"batches": 41}, {"draws": 3}, {"measure_tries": 0}])
def test_adcl_names_a_parameter_that_is_out_of_bounds(parameters):
    with pytest.raises(RunError, match=r"curriculum\.(batches|draws|measure_tries) must be"):
        Adcl(TASKS, seed=0, **parameters)
