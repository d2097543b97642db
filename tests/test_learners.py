"""Curricula on simulated learners: what the table in results/curricula_simulated.md says of them, on two seeds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from learners import WORLDS, Learner, course

from curricula.adarft import Adarft
from curricula.irt import Irt
from curricula.learnable import Learnable
from curricula.uniform import Uniform

FOUR = WORLDS["four skills"]


def test_a_learner_learns_from_groups_with_spread_alone():
    learner = Learner(FOUR, 0)
    learner.theta[:] = 50.0
    learner.answer(learner.tasks[:64], 0, 8)
    assert (learner.theta == 50).all() and learner.rollouts == 512
    learner.theta[:] = 0.0
    learner.answer(learner.tasks[:64], 0, 8, measured=True)
    assert (learner.theta == 0).all()
    learner.answer(learner.tasks[:64], 0, 8)
    assert (learner.theta > 0).all()


def test_a_learner_learns_nothing_from_hopeless_and_guessed_tasks():
    learner = Learner(WORLDS["hopeless and guessed tasks"], 0)
    tasks = [learner.tasks[i] for i in np.flatnonzero(~learner.learnable)]
    outcomes = learner.answer(tasks, 0, 8)
    assert learner.theta.tolist() == [-0.5]
    assert 0.2 < np.mean([np.mean(outcome.passed) for outcome in outcomes]) < 0.3


@pytest.mark.parametrize(
    ("make", "order", "ratio"),
    [
        (partial(Learnable, difficulty="level"), 0.9, 0.95),
        (partial(Irt, text=False), 0.9, 0.85),
        (partial(Adarft, difficulty="level"), 0.8, 0.9),
    ],
    ids=["learnable", "irt", "adarft"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_curricula_find_the_order_of_difficulty_and_need_fewer_rollouts_than_uniform(make, order, ratio, seed):
    found, uniform = course(make, FOUR, seed), course(Uniform, FOUR, seed)
    assert found.correlation is not None and found.correlation > order
    assert found.rollouts is not None and uniform.rollouts is not None
    assert found.rollouts < ratio * uniform.rollouts
