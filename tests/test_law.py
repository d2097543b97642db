"""The running fit of success against entropy."""

import json
import math

import numpy as np
import pytest

from rlpost.law import EntropyLaw


def steps(num, *, noise):
    dice = np.random.default_rng(0)
    entropies = np.linspace(1.2, 0.2, num)
    return [(h, 0.9 - 0.2 * math.exp(h) + noise * dice.standard_normal()) for h in entropies]


def test_the_law_is_the_least_squares_line_through_all_steps():
    law, points = EntropyLaw(), steps(40, noise=0.05)
    for entropy, success in points:
        law.observe(entropy=entropy, success=success)
    x, y = np.exp([h for h, _ in points]), np.array([r for _, r in points])
    slope, intercept = np.polyfit(x, y, 1)
    expected = {
        "slope": -slope,
        "intercept": intercept,
        "ceiling": intercept + slope,
        "r2": np.corrcoef(x, y)[0, 1] ** 2,
    }
    assert law.figures() == pytest.approx({f"law/{name}": value for name, value in expected.items()}, rel=1e-9)


def test_too_few_steps_or_none_that_move_say_nothing():
    law = EntropyLaw()
    for entropy, success in steps(9, noise=0.0):
        law.observe(entropy=entropy, success=success)
    assert law.figures() == {}
    still = EntropyLaw()
    for _ in range(20):
        still.observe(entropy=0.5, success=0.0)
    assert still.figures() == {}


def test_the_law_resumes_exactly():
    law, resumed = EntropyLaw(), EntropyLaw()
    points = steps(20, noise=0.05)
    for entropy, success in points[:7]:
        law.observe(entropy=entropy, success=success)
    resumed.load_state_dict(json.loads(json.dumps(law.state_dict())))
    for entropy, success in points[7:]:
        law.observe(entropy=entropy, success=success)
        resumed.observe(entropy=entropy, success=success)
    assert resumed.figures() == law.figures()
