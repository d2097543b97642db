"""What the adaptive curricula share: posteriors worked out by hand, draws by weight, files of difficulty."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from curricula._files import difficulty_of
from curricula._pool import Pool, drawn, edges_of, packed, unpacked
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(key, key, extra={"terms": terms}) for key, terms in zip("abcd", (2, 2, 3, None), strict=True)]


def outcome(key, passes, tries, step=0):
    return Outcome(key, (), step, (True,) * passes + (False,) * (tries - passes))


def test_pool_posterior_matches_hand_table():
    """One level. 3 of 4 and 0 of 4: the rate of all is (1 + 3) / (2 + 8) = .4, the level's (3 + 4 * .4) / (8 + 4)."""
    pool = Pool(TASKS, seed=0, borrow=2.0)
    pool.observe([outcome("a", 3, 4), outcome("b", 0, 4)])
    level = (3 + 4 * 0.4) / 12
    a, b = pool.beta()
    np.testing.assert_allclose(a, [3 + 2 * level, 2 * level, 2 * level, 2 * level], rtol=1e-6)
    np.testing.assert_allclose(b, [1 + 2 * (1 - level), 4 + 2 * (1 - level), *[2 * (1 - level)] * 2], rtol=1e-6)
    np.testing.assert_allclose(pool.pass_rates([1]), [2 * level / 6], rtol=1e-6)


def test_pool_counts_are_halved_every_half_life():
    pool = Pool(TASKS, seed=0, half_life=10)
    pool.observe([outcome("a", 4, 8)])
    pool.observe([outcome("b", 0, 0, step=20)])  # time goes on, and nothing could be judged
    mean = pool.level_means()[0]
    a, b = pool.beta([0])
    np.testing.assert_allclose([a[0] - 2 * mean, b[0] - 2 * (1 - mean)], [1.0, 1.0], rtol=1e-6)
    pool.observe([outcome("a", 8, 8, step=20)])
    assert (float(pool.passes[0]), float(pool.fails[0])) == (9.0, 1.0)
    assert pool.level_tries.sum() == pytest.approx(8 / 4 + 8)


def test_pool_levels_lend_each_other_their_rate():
    pool = Pool(TASKS, seed=0, difficulty="terms", borrow=4.0)
    assert pool.level.tolist() == [0, 0, 1, 2]  # the last one is for what has no number
    pool.observe([outcome("a", 16, 16), outcome("c", 0, 16)])
    rate = pool.pass_rates()
    assert rate[0] > rate[1] > 0.8 and rate[2] < 0.1 and rate[3] == pytest.approx(0.5, abs=0.05)


def test_pool_takes_unjudged_and_unequal_groups():
    pool = Pool(TASKS, seed=0)
    pool.observe([Outcome("a", (1.0, None, 0.5), 0, (True, None, False)), Outcome("b", (1.0, 0.0, 0.0), 0)])
    assert pool.passes.tolist() == [1, 1, 0, 0] and pool.fails.tolist() == [1, 2, 0, 0]


def test_pool_figures_say_what_was_chosen_by_success_difficulty_and_source():
    tasks = [Task(str(i), str(i), extra={"terms": i}, source="ab"[i % 2]) for i in range(4)]
    pool = Pool(tasks, seed=0, difficulty="terms")
    pool.observe([outcome("0", 8, 8)])
    pool.take([0, 1, 3])
    pool.take([3])
    said = pool.metrics()
    assert said["chosen"] == 4 and said["chosen_difficulty"] == 7 / 4 and said["chosen_untried"] == 0.75
    assert said["chosen_again"] == 0.25 and said["tried_frac"] == 0.25
    assert (said["chosen_from/a"], said["chosen_from/b"]) == (0.25, 0.75)
    pool.take([0])
    assert pool.metrics()["chosen"] == 1  # since the last call


def test_pool_explains_a_task():
    pool = Pool(TASKS, seed=0, difficulty="terms")
    pool.observe([outcome("a", 3, 4, step=5)])
    pool.take([0])
    said = pool.explain("a")
    assert (said["passes"], said["fails"], said["seen_at"], said["drawn"], said["difficulty"]) == (3, 1, 5, 1, 2)
    assert 0.6 < said["pass_rate"] < 0.8 and 0 < said["pass_rate_sd"] < 0.3


def test_drawn_is_in_proportion_to_weights():
    weights, dice = np.array([1.0, 2.0, 0.0, 5.0], dtype=np.float32), np.random.default_rng(0)
    first = np.bincount([drawn(1, weights, dice)[0] for _ in range(8000)], minlength=4) / 8000
    np.testing.assert_allclose(first, weights / 8, atol=4 * math.sqrt(0.25 / 8000))


def test_drawn_second_place_is_in_proportion_to_what_is_left():
    weights, dice = np.array([1.0, 2.0, 5.0], dtype=np.float32), np.random.default_rng(1)
    pairs = [tuple(drawn(2, weights, dice).tolist()) for _ in range(8000)]
    assert all(a != b for a, b in pairs)
    assert pairs.count((2, 1)) / 8000 == pytest.approx(5 / 8 * 2 / 3, abs=0.025)


def test_drawn_repeats_only_where_it_must():
    counts = np.bincount(drawn(7, np.array([1.0, 9.0, 0.0], dtype=np.float32), np.random.default_rng(0)), minlength=3)
    assert sorted(counts.tolist()) == [0, 3, 4] and counts[2] == 0
    assert sorted(drawn(3, np.zeros(3, dtype=np.float32), np.random.default_rng(0)).tolist()) == [0, 1, 2]
    assert len(drawn(0, np.ones(3, dtype=np.float32), np.random.default_rng(0))) == 0


def test_edges_part_few_values_and_else_deciles():
    assert edges_of(np.array([3.0, 2.0, 2.0, math.nan])).tolist() == [2.5]
    assert len(edges_of(np.arange(1000.0))) == 9


@pytest.mark.parametrize("kind", ["<f4", "<i4", "<f8"])
def test_packed_arrays_come_back_bit_by_bit(kind):
    array = np.random.default_rng(0).standard_normal(1000).astype(kind)
    found = unpacked(json.loads(json.dumps(packed(array))), kind)
    assert found.tobytes() == array.tobytes() and found.flags.writeable


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_difficulty_of_a_file_is_the_mean_over_models_and_counts_are_prior_tries(tmp_path):
    rows = [
        {"key": "a", "model": "m", "difficulty": 0.25, "passes": 3, "tries": 4},
        {"key": "a", "model": "n", "difficulty": 0.75, "passes": 1, "tries": 4},
        {"key": "gone", "difficulty": 0.5},
        {"key": "b", "difficulty": None},
    ]
    path = write(tmp_path / "difficulty.jsonl", rows)
    found = difficulty_of(TASKS, path)
    assert found[0] == 0.5 and np.isnan(found[1:]).all()
    pool = Pool(TASKS, seed=0, difficulty=path)
    assert (pool.passes[0], pool.fails[0], pool.seen_at.tolist()) == (4, 4, [0, -1, -1, -1])
    other = Pool(TASKS, seed=0, difficulty=path)
    pool.observe([outcome("a", 0, 4, step=2)])
    other.load_state_dict(json.loads(json.dumps(pool.state_dict())))
    assert other.state_dict() == pool.state_dict() and other.beta()[0].tobytes() == pool.beta()[0].tobytes()


@pytest.mark.parametrize(
    ("difficulty", "message"),
    [
        ("none.jsonl", r"curriculum\.difficulty: the file none\.jsonl must exist .* `rlpost difficulty RECIPE --out"),
        ("term", r"no numbers in `term`, did you mean `terms`\?"),
    ],
)
def test_difficulty_that_is_not_there_is_named(difficulty, message):
    with pytest.raises(RunError, match=message):
        Pool(TASKS, seed=0, difficulty=difficulty)


def test_difficulty_files_are_checked(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"key": "a", "difficulty": 1}\n{"ke')
    with pytest.raises(RunError, match="line 2 is not"):
        difficulty_of(TASKS, str(tmp_path / "bad.jsonl"))
    with pytest.raises(RunError, match="has none of the keys"):
        difficulty_of(TASKS, write(tmp_path / "other.jsonl", [{"key": "x", "difficulty": 1}]))


@pytest.mark.parametrize("parameters", [{"half_life": 0}, {"borrow": 0.0}])
def test_pool_names_a_parameter_that_is_out_of_bounds(parameters):
    with pytest.raises(RunError, match=rf"curriculum\.{next(iter(parameters))} must be > 0"):
        Pool(TASKS, seed=0, **parameters)
