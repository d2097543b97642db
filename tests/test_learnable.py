"""learnable: weights by hand, the floor, the correction, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest

from curricula.learnable import Learnable, expected_variance, mixed_probability
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(str(i), str(i)) for i in range(4)]


def outcome(key, passes, tries, step=0):
    return Outcome(str(key), (), step, (True,) * passes + (False,) * (tries - passes))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 4.0), (20.0, 5.0)])
@pytest.mark.parametrize("group", [2, 5, 16])
def test_signals_are_what_beta_draws_have_on_average(a, b, group):
    p = np.random.default_rng(0).beta(a, b, 400_000)
    a, b = np.array([a]), np.array([b])
    assert expected_variance(a, b)[0] == pytest.approx((p * (1 - p)).mean(), abs=2e-3)
    assert mixed_probability(a, b, group)[0] == pytest.approx((1 - p**group - (1 - p) ** group).mean(), abs=5e-3)


def test_a_group_of_two_is_mixed_twice_as_often_as_the_variance():
    a, b = np.array([0.5, 3.0]), np.array([2.0, 3.0])
    np.testing.assert_allclose(mixed_probability(a, b, 2), 2 * expected_variance(a, b), rtol=1e-12)


@pytest.mark.parametrize("weight", ["variance", "mixed"])
def test_learnable_weighs_by_signal_and_keeps_a_floor(weight):
    curriculum = Learnable(TASKS, seed=0, weight=weight, floor=0.2, half_life=None)
    curriculum.observe([outcome(0, 100, 100), outcome(1, 50, 100), outcome(2, 0, 100)])
    weights = curriculum.weights()
    assert weights.sum() == pytest.approx(1, abs=1e-6) and weights.min() >= 0.2 / 4
    a, b = curriculum.beta()
    signal = expected_variance(a, b) if weight == "variance" else mixed_probability(a, b, 8)
    np.testing.assert_allclose(weights, 0.8 * signal / signal.sum() + 0.05, rtol=1e-5)
    assert weights[1] > weights[3] > weights[0]  # known to be mixed, not known, known to be solved


def test_learnable_comes_back_to_what_it_has_not_seen_for_long():
    curriculum = Learnable(TASKS, seed=0, half_life=5)
    curriculum.observe([outcome(i, passes, 16) for i, passes in enumerate((0, 8, 8, 8))])
    before = curriculum.weights()[0]
    curriculum.observe([outcome(1, 8, 16, step=40)])
    assert curriculum.weights()[0] > 3 * before


def test_learnable_corrects_its_bias():
    curriculum = Learnable(TASKS, seed=0, correct=True)
    curriculum.observe([outcome(0, 100, 100), outcome(1, 50, 100)])
    weights = curriculum.weights()
    [task] = curriculum.select(1)
    assert curriculum.correction(task.key) == pytest.approx(1 / (4 * weights[int(task.key)]), rel=1e-6)
    curriculum.select(4)  # a later wave of the step
    assert len(curriculum.factor) == 4
    ess = curriculum.metrics()["correction_ess"]
    factors = np.array([curriculum.correction(str(i)) for i in range(4)])
    assert ess == pytest.approx(factors.sum() ** 2 / (4 * (factors**2).sum()))
    curriculum.select(2)
    assert len(curriculum.factor) == 2
    assert Learnable(TASKS, seed=0).correction("0") == 1.0


@pytest.mark.parametrize(
    "parameters", [{"weight": "entropy"}, {"group_size": 1}, {"floor": 1.5}, {"floor": 0.0, "correct": True}]
)
def test_learnable_names_a_parameter_that_is_out_of_bounds(parameters):
    with pytest.raises(RunError, match=rf"curriculum\.{next(iter(parameters))} must be"):
        Learnable(TASKS, seed=0, **parameters)
