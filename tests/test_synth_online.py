"""Rounds of synthesis while a run trains, with quick stages: what joins the tasks, the caps, exact resume."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from lab import ROOT, make_lab, train_here

from rlpost.metrics import Metrics
from rlpost.synth.online import diversity, reason_to_stop, room_of
from rlpost.synth_recipe import Online
from rlpost.types import Task

SYNTH = (
    "{train: {use: 'synth_lab:no_generator'}, sample: {use: 'synth_lab:sums', number: 200}, "
    "screen: [{use: rules, pattern: '\\d([+-]\\d){2,}='}, {use: near_duplicates}], "
    "distil: {use: 'synth_lab:solver', k: 3}, filters: [{use: agreement}, {use: policy}], "
    "online: {every: 2, seeds: 8, number: 40, most: 12, measure: 4, below: 1.0, budget: 14, share: 0.5}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("online"))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")


def run(folder, world, name, *overrides):
    own = [f"synth={SYNTH}", "rewards=[{use: 'synth_lab:coin'}]", "curriculum={use: learnable}"]
    return train_here(folder, world, name, *own, *overrides)


@pytest.mark.slow
def test_problems_join_the_tasks_with_their_pass_rate_up_to_the_budget_and_resume_exactly(folder, single_rank):
    lines = run(folder, single_rank, "whole", "steps=7", "save_every=3")
    added = [line.get("synth/added", 0) for line in lines]
    assert added[0] == added[1] == added[3] == 0 and added[2] > 0
    assert sum(added) <= 14
    assert lines[2]["synth/sample"] == 40 and lines[2]["synth/seeds"] > 0
    assert lines[2]["synth/measured"] >= lines[2]["synth/sometimes_solved"] >= added[2]
    state = json.loads((folder / "runs/whole/checkpoints/step-000007/state.json").read_text())
    joined = state["curriculum"]["added"]
    assert len(joined) == sum(added) and {task["source"].partition(":")[0] for task in joined} == {"synth"}
    rounds = sorted(path.name for path in (folder / "runs/whole/online").iterdir())
    assert rounds[0] == "round-000002" and (folder / "runs/whole/online/round-000002/synth/funnel.json").exists()

    run(folder, single_rank, "halves", "steps=7", "save_every=3", "preempt.after_s=null", "steps=3")
    again = run(folder, single_rank, "halves", "steps=7", "save_every=3", "resume=auto")
    assert again == lines


def fake(*, added=0, real=20, curve=()):
    """What the caps look at."""
    tasks = [Task(f"s{i}", "1+1=", source="synth:2") for i in range(added)]
    world = SimpleNamespace(is_main=True, size=1, all_gather_object=lambda item: [item])
    rows = [{"eval/pass@1": value} for value in curve]
    return SimpleNamespace(
        curriculum=SimpleNamespace(added=tasks),
        task_keys=frozenset(f"r{i}" for i in range(real)),
        world=world,
        metrics=Metrics(world),
        lookout=SimpleNamespace(rows=rows),
    )


@pytest.mark.parametrize(
    ("cap", "added", "room"),
    [({"budget": 5}, 2, 3), ({"share": 0.5}, 0, 20), ({"share": 0.2}, 5, 0), ({"share": 1.0, "budget": 50}, 0, 50)],
)
def test_the_budget_and_the_share_of_the_pool_bound_what_is_added(cap, added, room):
    assert room_of(fake(added=added), Online(**{"budget": 1000, **cap})) == room


def test_a_fall_on_real_problems_ends_synthesis():
    online = Online(drop=0.05)
    assert reason_to_stop(fake(), online) is None
    assert reason_to_stop(fake(curve=(0.5, 0.6, 0.56)), online) is None
    assert "fell from 0.600 to 0.540" in str(reason_to_stop(fake(curve=(0.5, 0.6, 0.54)), online))


def test_diversity_is_low_where_problems_are_alike():
    alike = ["a b c d e f", "a b c d e g", "a b c d e h"]
    assert diversity(alike) < 0.5 < diversity(["a b c d", "e f g h", "i j k l"])
