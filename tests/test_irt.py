"""irt: estimators against their definition and in their traps, then the curriculum on answers of a known model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from curricula._irt import TEXT_FEATURES, ability_map, amortised, fit, logit_difficulty, sigmoid, text_features
from curricula.irt import Irt
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

ABILITIES = np.linspace(-2, 2, 9)


def answers(difficulty, abilities, tries, seed=0, slope=1.0):
    p = sigmoid(slope * (np.asarray(abilities)[:, None] - difficulty))
    return np.random.default_rng(seed).binomial(tries, p).astype(float), np.full(p.shape, float(tries))


def test_ability_is_the_maximum_of_the_posterior():
    rng = np.random.default_rng(0)
    b, tries = rng.normal(0, 1, 30), rng.integers(1, 9, 30).astype(float)
    k = rng.binomial(tries.astype(int), sigmoid(0.7 - b)).astype(float)

    def loss(theta, prior=(0.5, 2.0)):
        z = theta - b
        return (tries * np.logaddexp(0, z) - k * z).sum() + (theta - prior[0]) ** 2 / 2 / prior[1] ** 2

    theta, error = ability_map(b, k, tries, prior=(0.5, 2.0))
    assert theta == pytest.approx(minimize_scalar(loss).x, abs=1e-6)
    curvature = (loss(theta + 1e-3) - 2 * loss(theta) + loss(theta - 1e-3)) / 1e-6
    assert error == pytest.approx(curvature**-0.5, rel=1e-3)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_ability_stays_finite_where_all_or_no_answers_are_right(right):
    """Maximum likelihood diverges here."""
    theta, error = ability_map(np.zeros(500), np.full(500, 16 * right), np.full(500, 16.0))
    assert 1 < abs(theta) < 8 and np.sign(theta) == 2 * right - 1 and 0 < error < 1
    far, _ = ability_map(np.zeros(500), np.full(500, 16 * right), np.full(500, 16.0), start=-20.0 * (2 * right - 1))
    assert far == pytest.approx(theta, abs=1e-6)  # from the wrong side, where p (1 - p) is 0


def test_wrong_answers_count():
    """With a product as in log((2 p - 1) z + 1 - p) and answers of 0 and 1, a 0 would be left out: theta too high."""
    b, right, wrong = np.zeros(20), np.ones(10), np.zeros(10)
    both, _ = ability_map(b, np.concatenate([right, wrong]), np.ones(20))
    without, _ = ability_map(b[:10], right, np.ones(10))
    assert both == pytest.approx(0.0, abs=1e-9) and without > 1


@pytest.mark.parametrize("wrong", [-1.0, np.nan, 3.0])
def test_an_answer_that_is_no_count_is_refused(wrong):
    with pytest.raises(RunError, match="a wrong answer is 0, not -1"):
        ability_map(np.zeros(2), np.array([1.0, wrong]), np.ones(2))
    with pytest.raises(RunError, match="a wrong answer is 0, not -1"):
        fit(np.array([[1.0, wrong]]), np.ones((1, 2)))


def test_rasch_recovers_order_of_items_and_models():
    b = np.random.default_rng(1).normal(0, 1.5, 300)
    found = fit(*answers(b, ABILITIES, 4))
    assert spearmanr(found.difficulty, b).statistic > 0.95
    assert spearmanr(found.ability, ABILITIES).statistic > 0.99
    assert np.isfinite(found.difficulty).all() and (found.precision > 0).all() and (found.slope == 1).all()


def test_rasch_keeps_items_finite_that_all_or_no_models_solve():
    passes, tries = answers(np.array([-14.0, 0.0, 14.0]), ABILITIES, 16)
    found = fit(passes, tries)
    assert passes[:, 0].min() == 16 and passes[:, 2].max() == 0
    assert -8 < found.difficulty[0] < -2 and 2 < found.difficulty[2] < 8


def test_an_item_that_was_not_tried_keeps_its_prior():
    passes, tries = answers(np.array([0.0, 1.0]), ABILITIES, 8)
    passes[:, 1], tries[:, 1] = 0, 0
    found = fit(passes, tries)
    assert found.difficulty[1] == pytest.approx(0, abs=1e-4) and found.precision[1] == pytest.approx(0.25)


def test_2pl_tells_steep_items_from_flat_ones():
    b = np.random.default_rng(2).normal(0, 1, 200)
    slope = np.where(np.arange(200) % 2, 2.0, 0.5)
    found = fit(*answers(b, np.linspace(-3, 3, 25), 16, slope=slope), model="2pl", slope_sd=0.5)
    assert found.slope[1::2].mean() > 1.5 * found.slope[::2].mean()
    assert spearmanr(found.difficulty, b).statistic > 0.9


def test_difficulty_of_what_was_never_tried_is_read_from_its_text():
    rng = np.random.default_rng(0)
    terms = rng.integers(2, 9, 400)
    texts = ["+".join(str(x) for x in rng.integers(0, 9, n)) + "=" for n in terms]
    b = terms - 5 + rng.normal(0, 0.5, 400)
    features = np.empty((400, TEXT_FEATURES + 3), dtype=np.float32)
    text_features(texts, features)
    predicted = amortised(features, np.arange(100), b[:100], np.ones(100))
    assert spearmanr(predicted[100:], b[100:]).statistic > 0.9


def test_given_difficulties_become_logits_or_are_standardised():
    np.testing.assert_allclose(logit_difficulty(np.array([0.5, 0.75])), [0, np.log(3)])
    assert logit_difficulty(np.array([2.0, 4.0, 6.0])).std() == pytest.approx(1)
    assert logit_difficulty(np.array([3.0, 3.0])).tolist() == [0, 0]


def learner(curriculum, b, theta, steps, n=16):
    """Answer what is chosen, with an ability that does not change; the true b of all that was chosen."""
    rng, size, chosen = np.random.default_rng(0), 8, []
    for step in range(steps):
        tasks = curriculum.select(n)
        places = np.array([int(task.key) for task in tasks])
        passes = rng.binomial(size, sigmoid(theta - b[places]))
        flags = [(True,) * k + (False,) * (size - k) for k in passes]
        curriculum.observe([Outcome(t.key, (), step, f) for t, f in zip(tasks, flags, strict=True)])
        chosen.append(b[places])
    return np.array(chosen)


def tasks_with(b):
    """Tasks whose text says a little about their difficulty."""
    return [Task(str(i), "x" * int(5 * (x - b.min()) + 1)) for i, x in enumerate(b)]


def test_irt_finds_difficulties_and_stays_near_its_ability():
    b = np.random.default_rng(3).normal(0, 2, 300)
    curriculum = Irt(tasks_with(b), seed=0, window=[-1.0, 1.0])
    chosen = learner(curriculum, b, theta=1.0, steps=60, n=4)
    assert spearmanr(curriculum.b, b).statistic > 0.85  # also of those that were never tried
    assert np.abs(chosen[-20:] - 1).mean() < 0.8 * np.abs(b - 1).mean()
    untried = curriculum.seen_at < 0
    assert untried.any() and spearmanr(curriculum.b[untried], b[untried]).statistic > 0.8


def test_irt_with_the_window_of_pudf_takes_what_is_easier_than_the_ability():
    b = np.random.default_rng(4).normal(0, 2, 300)
    path_free = Irt(tasks_with(b), seed=0, window=[None, 0.0])
    chosen = learner(path_free, b, theta=0.0, steps=60)
    assert (chosen[-20:] < 0.7).mean() > 0.8 > (b < 0.7).mean()


def test_irt_follows_an_ability_that_grows():
    b = np.random.default_rng(5).normal(0, 1, 300)
    curriculum = Irt(tasks_with(b), seed=0)
    learner(curriculum, b, theta=-1.0, steps=20)
    before = curriculum.theta
    for step in range(20, 30):
        tasks = curriculum.select(16)
        rng = np.random.default_rng(step)
        flags = [tuple(rng.random(8) < sigmoid(1.5 - b[int(t.key)])) for t in tasks]
        curriculum.observe([Outcome(t.key, (), step, f) for t, f in zip(tasks, flags, strict=True)])
    assert before < -0.3 and curriculum.theta > before + 1.2


def test_irt_looks_higher_where_its_window_does_not_grow(monkeypatch):
    monkeypatch.setattr("curricula.irt.PATIENCE", 3)
    tasks = [Task(str(i), "x", extra={"level": i}) for i in range(10)]
    curriculum = Irt(tasks, seed=0, window=[None, 0.0], nudge=0.1, difficulty="level", text=False)
    for step in range(12):
        curriculum.observe([Outcome("0", (), step, (True, False))])
    assert curriculum.metrics()["nudged"] == pytest.approx(0.3, abs=0.11)


def test_irt_trains_on_everything_in_the_end():
    tasks = [Task(str(i), "x", extra={"level": i}) for i in range(40)]
    curriculum = Irt(tasks, seed=0, window=[None, 0.0], difficulty="level", text=False, all_after=5)
    curriculum.observe([Outcome("0", (), 5, (True, False))])
    assert len({task.key for task in curriculum.select(40)}) == 40


def write_responses(path, b, models):
    passes, _ = answers(b, models, 8)
    rows = [
        {"key": str(i), "model": f"m{m}", "passes": int(passes[m, i]), "tries": 8}
        for m in range(len(models))
        for i in range(len(b))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["key"] != "7" or row["model"] != "m0"))
    return str(path)


@pytest.mark.parametrize("model", ["rasch", "2pl"])
def test_irt_begins_with_the_answers_of_several_models(tmp_path, model):
    b = np.random.default_rng(6).normal(0, 1.5, 120)
    path = write_responses(tmp_path / "responses.jsonl", b[:100], [-1.5, 0.0, 1.5])
    curriculum = Irt(tasks_with(b), seed=0, responses=path, model=model)
    assert spearmanr(curriculum.b[:100], b[:100]).statistic > 0.9
    assert spearmanr(curriculum.b[100:], b[100:]).statistic > 0.8  # not in the file: from the text
    assert curriculum.theta > 0.8  # of the last model
    other = Irt(tasks_with(b), seed=1, responses=path, model=model)
    curriculum.select(8)
    other.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert other.select(8) == curriculum.select(8)


def test_irt_needs_two_models(tmp_path):
    path = write_responses(tmp_path / "one.jsonl", np.zeros(5), [0.0])
    with pytest.raises(RunError, match=r"curriculum\.responses must be answers of at least two models \(got 1 model"):
        Irt(tasks_with(np.zeros(5)), seed=0, responses=path)


@pytest.mark.parametrize("parameters", [{"window": [1, 0]}, {"window": [1]}, {"half_life": 0}, {"model": "3pl"}])
def test_irt_names_a_parameter_that_is_out_of_bounds(parameters):
    with pytest.raises(RunError, match=rf"curriculum\.{next(iter(parameters))} must be"):
        Irt([Task("a", "a")], seed=0, **parameters)
