"""adarft, kimi, staged, difficulty_pool and seta: what each is defined to do, on few tasks."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from curricula.adarft import Adarft
from curricula.difficulty_pool import DifficultyPool
from curricula.kimi import Kimi
from curricula.seta import Seta, clusters
from curricula.staged import Staged
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(str(i), str(i), extra={"level": i / 10, "flat": 1}) for i in range(101)]


def outcome(key, passes, tries, step=0, measured=False):
    return Outcome(str(key), (), step, (True,) * passes + (False,) * (tries - passes), measured=measured)


def numbers(tasks):
    return [int(task.key) for task in tasks]


def test_adarft_moves_its_target_as_the_paper_has_it():
    curriculum = Adarft(TASKS, seed=0, difficulty="level", start=0.3)
    curriculum.observe([outcome(1, 4, 4), outcome(2, 2, 4)])
    assert curriculum.aim == pytest.approx(0.3 + 0.5 * math.tanh(2 * (0.75 - 0.5)))
    curriculum.observe([outcome(1, 0, 8, step=1)])
    assert curriculum.aim == pytest.approx(0.3 + 0.5 * math.tanh(0.5) - 0.5 * math.tanh(1))
    curriculum.observe([outcome(1, 0, 8, step=2)])
    assert curriculum.aim == 0.0  # clipped


def test_adarft_moves_once_a_step_however_many_waves():
    whole, parts = (Adarft(TASKS, seed=0, difficulty="level", start=0.5) for _ in range(2))
    answers = [outcome(i, min(4, i), 4, step=3) for i in range(7)]
    whole.observe(answers)
    for one in answers:
        parts.observe([one])
    assert parts.aim == pytest.approx(whole.aim) and whole.aim != 0.5
    parts.observe([outcome(9, 0, 50, step=3, measured=True)])
    assert parts.aim == pytest.approx(whole.aim)


def test_adarft_takes_the_nearest_and_not_the_same_again():
    curriculum = Adarft(TASKS, seed=0, difficulty="level", start=0.5, jitter=0.0, rest=0.5)
    assert sorted(numbers(curriculum.select(5))) == [48, 49, 50, 51, 52]
    assert sorted(numbers(curriculum.select(4))) == [46, 47, 53, 54]
    published = Adarft(TASKS, seed=0, difficulty="level", start=0.5, jitter=0.0, rest=0.0)
    assert sorted(numbers(published.select(5))) == sorted(numbers(published.select(5)))  # the flaw
    drawn = [key for _ in range(30) for key in numbers(curriculum.select(10))]
    assert set(drawn) <= set(range(101)) and max(map(drawn.count, drawn)) <= 6


def test_adarft_needs_difficulties_that_differ():
    with pytest.raises(RunError, match=r"curriculum\.difficulty must be of at least two values \(got 1 for every task"):
        Adarft(TASKS, seed=0, difficulty="flat")


def test_kimi_warms_up_from_easy_to_hard_over_all_tasks():
    curriculum = Kimi(TASKS, seed=0, difficulty="level", warmup_tasks=20)
    first = numbers(curriculum.select(12) + curriculum.select(8))
    assert first == sorted(first) and first[0] <= 5 and first[-1] >= 95 and len(set(first)) == 20
    assert all(4 <= b - a <= 6 for a, b in pairwise(first))
    later = numbers(curriculum.select(40))
    assert later != sorted(later)
    assert Kimi(TASKS, seed=0, difficulty="level").warmup_tasks == 25 and Kimi(TASKS, seed=0).warmup_tasks == 0


def test_kimi_draws_in_proportion_to_what_is_not_solved():
    tasks = TASKS[:3]
    curriculum = Kimi(tasks, seed=0, borrow=1e-6)
    curriculum.observe([outcome(0, 10, 10), outcome(1, 5, 10), outcome(2, 0, 10)])
    first = np.bincount([numbers(curriculum.select(1))[0] for _ in range(3000)], minlength=3) / 3000
    np.testing.assert_allclose(first, [0, 1 / 3, 2 / 3], atol=0.04)


def test_kimi_leaves_out_what_is_guessed(tmp_path):
    path = tmp_path / "guessed.jsonl"
    rows = [{"key": str(i), "passes": int(i % 2 == 0), "tries": 8} for i in range(101)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curriculum = Kimi(TASKS, seed=0, guesses=str(path), difficulty="level", warmup_tasks=10)
    assert all(number % 2 for number in numbers(curriculum.select(60)))
    assert curriculum.metrics()["guessed"] == 51
    with pytest.raises(RunError, match=r"curriculum\.guesses must leave tasks \(all 1 are guessed"):
        Kimi(TASKS[:1], seed=0, guesses=str(path))


def test_staged_follows_its_stages_by_step():
    stages = [{"steps": 2, "at_most": 1.0}, {"steps": 3, "at_least": 2.0, "at_most": 4.0}, {}]
    curriculum = Staged(TASKS, seed=0, difficulty="level", stages=stages)
    seen = []
    for step in range(8):
        chosen = numbers(curriculum.select(6))
        seen.append((min(chosen), max(chosen)))
        assert curriculum.metrics()["stage"] == (0 if step < 2 else 1 if step < 5 else 2)
        curriculum.observe([outcome(key, 1, 2, step) for key in chosen])
    assert all(high <= 10 for _, high in seen[:2]) and all(low >= 20 and high <= 40 for low, high in seen[2:5])
    assert max(high for _, high in seen[5:]) > 40


def test_staged_goes_round_within_a_stage():
    curriculum = Staged(TASKS, seed=0, difficulty="level", stages=[{"at_most": 0.9}])
    first = [numbers(curriculum.select(5)) for _ in range(4)]
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(10))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"steps": 2, "at_most": -1}, {}], r"stages\.0 must have tasks .*difficulties are from 0 to 10"),
        ([{"at_most": 1}, {}], r"stages\.0\.steps must be >= 1 for every stage but the last"),
        ([{"step": 2}, {}], r"stages\.0\.step: no such key, did you mean `steps`\?"),
        ([{"steps": "two"}, {}], r"stages\.0\.steps must be a number"),
        ([3], r"stages\.0 must be a mapping"),
        ([], r"stages must be a list of at least one stage"),
    ],
)
def test_staged_names_what_is_wrong_with_its_stages(stages, message):
    with pytest.raises(RunError, match=message):
        Staged(TASKS, seed=0, difficulty="level", stages=stages)


def test_difficulty_pool_gives_each_pool_its_share():
    curriculum = DifficultyPool(TASKS, seed=0, half_life=None)
    curriculum.observe([outcome(i, 20 if i < 40 else 10 if i < 80 else 0, 20) for i in range(101)])
    for _ in range(6):
        chosen = np.array(numbers(curriculum.select(20)))
        assert ((chosen < 40).sum(), (chosen >= 80).sum(), len(set(chosen.tolist()))) == (2, 4, 20)
    said = curriculum.metrics()
    assert (said["pool_easy"], said["pool_normal"], said["pool_hard"]) == (40, 40, 21)
    assert curriculum.drawn[40:80].min() >= 2  # 84 of 40 tasks: the least drawn first


def test_difficulty_pool_fills_a_step_from_the_other_pools():
    curriculum = DifficultyPool(TASKS, seed=0, half_life=None)
    curriculum.observe([outcome(i, 20, 20) for i in range(101)])
    assert len(set(numbers(curriculum.select(50)))) == 50


@pytest.mark.parametrize("parameters", [{"hard": 0.9}, {"easy_share": 0.9, "hard_share": 0.2}])
def test_difficulty_pool_refuses_pools_that_overlap(parameters):
    with pytest.raises(RunError, match=r"curriculum\.(hard|easy_share) must be"):
        DifficultyPool(TASKS, seed=0, **parameters)


def test_clusters_are_no_worse_than_any_cut_of_the_line():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(centre, 0.02, 12) for centre in (0.1, 0.5, 0.9)])
    group = clusters(values, 3)

    def spread(group):
        return sum(((values[group == g] - values[group == g].mean()) ** 2).sum() for g in set(group.tolist()))

    order, best = np.argsort(values), math.inf
    for i in range(1, 35):
        for j in range(i + 1, 36):
            cut = np.zeros(36, dtype=int)
            cut[order[i:]], cut[order[j:]] = 1, 2
            best = min(best, spread(cut))
    assert spread(group) == pytest.approx(best)
    assert clusters(np.full(7, 0.5), 5).tolist() == [0] * 7


def test_seta_slides_its_window_from_easy_to_hard_and_anneals():
    tasks = TASKS[:100]
    curriculum = Seta(tasks, seed=0, epochs=8, ratio=0.0, groups=5, window=0.6, delta=0.75)

    def epoch():
        chosen = []
        while not chosen or curriculum.position < len(curriculum.queue):
            chosen += numbers(curriculum.select(1))
        # pass rate falls with the number: five groups of twenty
        curriculum.observe([outcome(i, [100, 80, 50, 20, 0][i // 20], 100) for i in chosen])
        return sorted({i // 20 for i in chosen}), len(chosen)

    assert [epoch() for _ in range(8)] == [
        ([0, 1, 2, 3, 4], 100),
        ([1, 2, 3], 60),
        ([2, 3, 4], 60),
        ([0, 1, 2], 60),
        ([1, 2, 3], 60),
        ([2, 3, 4], 60),
        ([0, 1, 2, 3, 4], 100),
        ([0, 1, 2, 3, 4], 100),
    ]
    assert curriculum.metrics()["annealing"] == 1.0


def test_seta_prunes_at_random():
    curriculum = Seta(TASKS[:100], seed=0, ratio=0.3)
    first = numbers(curriculum.select(70))
    assert len(set(first)) == 70 and curriculum.metrics()["epoch_tasks"] == 70
