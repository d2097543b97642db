"""The difficulty service: estimates against their definition, the command, and going on after an accident."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from lab import RECIPE, REWARDS, rlpost

from curricula._files import difficulty_of
from curricula.irt import Irt
from rlpost import difficulty
from rlpost.check import load_and_check
from rlpost.difficulty import Ask, append, measure, measure_each, recorded
from rlpost.errors import RunError
from rlpost.model_source import model_folder
from rlpost.passuntil import PASSES, estimate, wilson
from rlpost.tasks import load_task_sets

HEAD = {"model": "m", "asked": "n=4"}


def plan(draw, n, until):
    """The flags that PassUntil sees of an endless sequence."""
    flags = [draw() for _ in range(n)]
    while sum(flags) < PASSES and len(flags) < until:
        flags += [draw() for _ in range(min(len(flags), until - len(flags)))]
    return flags


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_passuntil_is_unbiased_whatever_the_pass_rate(p):
    """Over all sequences of 8 draws, n=4 first: exact."""
    mean = 0.0
    for flags in product([True, False], repeat=8):
        seen = flags[:4] if sum(flags[:4]) >= PASSES else flags
        weight = np.prod([p if flag else 1 - p for flag in flags])
        mean += weight * estimate(list(seen), n=4)["pass_rate"]
    assert mean == pytest.approx(p, abs=1e-12)


def test_passuntil_finds_rare_passes_where_a_fixed_number_finds_none():
    rng = np.random.default_rng(0)
    rates, draws = [], []
    for _ in range(300):
        flags = plan(lambda: bool(rng.random() < 0.01), n=16, until=4096)
        rates.append(estimate(flags, 16)["pass_rate"])
        draws.append(len(flags))
    assert np.mean(rates) == pytest.approx(0.01, abs=0.002) and min(rates) > 0
    assert np.mean(draws) < 600


def test_estimate_counts_what_could_be_judged():
    assert estimate([None, True, None, False], n=4) | {"low": 0, "high": 0} == {
        "passes": 1,
        "tries": 2,
        "unjudged": 2,
        "pass_rate": 0.5,
        "low": 0,
        "high": 0,
        "difficulty": 0.5,
    }
    nothing = estimate([None, None], n=2)
    assert (nothing["pass_rate"], nothing["difficulty"], nothing["low"], nothing["high"]) == (None, None, 0.0, 1.0)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_wilson_holds_the_pass_rate_as_often_as_it_says(p):
    counts = np.random.default_rng(0).binomial(32, p, 4000)
    inside = [low <= p <= high for low, high in (wilson(int(k), 32) for k in counts)]
    assert 0.92 < np.mean(inside) <= 1
    assert wilson(0, 16)[0] == 0 < wilson(0, 16)[1] < 0.25 and wilson(16, 16)[1] == 1


def test_a_torn_last_line_is_dropped_and_whole_ones_are_kept(tmp_path):
    out = tmp_path / "difficulty.jsonl"
    assert recorded(out, HEAD) == set()
    append(out, [HEAD | {"key": "a"}, HEAD | {"key": "b"}])
    append(out, [{"model": "other", "asked": "n=9", "key": "c"}])
    whole = out.read_text()
    out.write_text(whole + '{"key": "d", "mod')
    assert recorded(out, HEAD) == {"a", "b"} and out.read_text() == whole


def test_a_file_of_another_question_is_refused(tmp_path):
    out = tmp_path / "difficulty.jsonl"
    append(out, [HEAD | {"key": "a"}])
    with pytest.raises(RunError, match=r"has answers of m to another question \(n=4; asked is n=8\)"):
        recorded(out, HEAD | {"asked": "n=8"})
    out.write_text("{}\n")
    with pytest.raises(RunError, match="must be a file of `rlpost difficulty`, or new"):
        recorded(out, HEAD)


@pytest.mark.parametrize("asked", [{"n": 0}, {"n": 16, "until": 8}, {"n": -1, "probe": "x"}])
def test_a_question_that_makes_no_sense_is_refused(asked):
    with pytest.raises(RunError, match="--"):
        Ask(**asked)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A user's folder, and the overrides that make its recipe quick and its pass rates neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("difficulty")
    (folder / "mylab").mkdir()
    (folder / "mylab" / "rewards.py").write_text(
        REWARDS + "\n\ndef early_digit(rollout):\n    return float(rollout.text[:1] in '01234')\n"
    )
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def load(tiny, *overrides):
    own = [f"run_dir={tiny / 'runs'}", "generator.kind=hf", "tasks.eval=null", "sft=null"]
    quick = [
        f"rewards=[{{use: '{tiny}/mylab/rewards.py:early_digit'}}]",
        "sampling.max_new_tokens=2",
        "tasks.train.limit=12",
    ]
    return load_and_check(tiny / "tiny.yaml", [*own, *quick, *overrides])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_service_goes_on_after_an_accident_to_the_same_file(tiny, single_rank, monkeypatch):
    monkeypatch.setattr(difficulty, "CHUNK", 5)
    recipe = load(tiny)
    whole = measure(recipe, single_rank, Ask(n=6), out=tiny / "whole.jsonl")
    out, calls = tiny / "cut.jsonl", []

    def fails(path, rows):
        calls.append(rows)
        if len(calls) == 2:
            path.write_text(path.read_text() + json.dumps(rows[0])[:30])  # a kill in the middle of a line
            raise KeyboardInterrupt
        append(path, rows)

    monkeypatch.setattr(difficulty, "append", fails)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, single_rank, Ask(n=6), out=out)
    assert len(out.read_text().splitlines()) == 6
    measure(recipe, single_rank, Ask(n=6), out=out)
    assert out.read_text() == whole.read_text()
    assert len(calls) == 4
    measure(recipe, single_rank, Ask(n=6), out=out)
    assert len(calls) == 4  # nothing left to do

    rows = rows_of(out)
    tasks, _ = load_task_sets(recipe)
    assert [row["key"] for row in rows] == [task.key for task in tasks]
    assert all(row["low"] <= row["pass_rate"] <= row["high"] and row["tries"] == 6 for row in rows)
    assert 0.1 < np.mean([row["pass_rate"] for row in rows]) < 0.7
    np.testing.assert_allclose(difficulty_of(tasks, str(out)), [1 - row["pass_rate"] for row in rows])


def test_the_service_collects_a_response_matrix_of_several_models(tiny, single_rank):
    recipe = load(tiny)
    models = [str(model_folder(load(tiny, f"seed={seed}"), single_rank)) for seed in (1, 2)]
    for model in models:
        out = measure(recipe, single_rank, Ask(n=4), out=tiny / "models.jsonl", model=model)
    rows = rows_of(out)
    assert [row["model"] for row in rows] == [models[0]] * 12 + [models[1]] * 12
    tasks, _ = load_task_sets(recipe)
    curriculum = Irt(tasks, seed=0, responses=str(out), text=False)
    assert np.isfinite(curriculum.b).all() and len(set(curriculum.b.tolist())) > 1


def test_the_service_probes_the_first_token(tiny, single_rank):
    recipe = load(tiny)
    out = measure(recipe, single_rank, Ask(n=0, probe="7"), out=tiny / "probe.jsonl")
    rows = rows_of(out)
    assert all(0 < row["probe_prob"] < 1 and row["difficulty"] == 1 - row["probe_prob"] for row in rows)
    firsts = {}
    for token in "0123456789+-=;#":
        path = measure(recipe, single_rank, Ask(n=0, probe=token), out=tiny / f"probe-{ord(token)}.jsonl")
        firsts[token] = rows_of(path)
    for i in range(12):
        best = max(firsts, key=lambda token: firsts[token][i]["probe_prob"])
        chosen = [token for token, found in firsts.items() if found[i]["probe_first"]]
        assert chosen in ([best], [])  # none where the end token or padding is the most probable
        assert sum(found[i]["probe_prob"] for found in firsts.values()) <= 1 + 1e-5
    with pytest.raises(RunError, match="--probe must be one token"):
        measure(recipe, single_rank, Ask(n=0, probe="77"), out=tiny / "two.jsonl")


def test_the_service_tries_on_where_passes_are_rare(tiny, single_rank):
    recipe = load(tiny, "rewards=[{use: exact_chain}]")  # a random model solves nothing
    rows = rows_of(measure(recipe, single_rank, Ask(n=4, until=10), out=tiny / "rare.jsonl"))
    assert all((row["passes"], row["tries"], row["difficulty"]) == (0, 10, 1.0) for row in rows)


def test_the_command_writes_where_it_says(tiny, capsys, monkeypatch):
    from rlpost import __main__

    class Alone:
        is_main = True

    monkeypatch.setattr(__main__, "with_world", lambda run, world: run(Alone()))
    monkeypatch.setattr(__main__, "shown", lambda recipe, world: recipe)
    monkeypatch.setattr(difficulty, "measure", lambda recipe, world, ask, **how: print(ask, how))
    arguments = ["difficulty", str(tiny / "tiny.yaml"), f"run_dir={tiny}", "--n", "8", "--passuntil", "64"]
    assert __main__.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Ask(n=8, until=64, probe=None)" in printed and f"difficulty: {tiny}/tiny-difficulty.jsonl" in printed
    assert __main__.main([*arguments, "--out", "x.jsonl", "--models", "a"]) == 0
    assert "'model': 'a'" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_asks_several_models_one_after_the_other_with_vllm(lab, single_rank):
    own, out = [f"run_dir={lab / 'runs'}", "sft=null", "tasks.train.limit=12"], lab / "matrix.jsonl"
    recipes = [load_and_check(lab / "tiny.yaml", [*own, f"seed={seed}"]) for seed in (1, 2)]
    models = [str(model_folder(recipe, single_rank)) for recipe in recipes]
    asked = [*own[1:], "--n", "4", "--out", str(out), "--models", *models]
    done = rlpost(lab, "difficulty", *asked)
    assert done.returncode == 0, done.stderr
    assert [row["model"] for row in rows_of(out)] == [models[0]] * 12 + [models[1]] * 12


def test_several_models_take_one_rank(monkeypatch):
    started = []
    monkeypatch.setattr(difficulty.subprocess, "run", lambda command, check: started.append(command))
    with pytest.raises(RunError, match="--models takes several models on one rank only"):
        measure_each(["a", "b"], ["difficulty", "x.yaml"], world_size=2)
    assert not started
