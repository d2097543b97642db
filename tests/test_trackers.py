import json
import math
import sys
import time
from types import SimpleNamespace

import pytest

from rlpost import trackers
from rlpost.errors import RunError
from rlpost.recipe import Logging, Recipe
from rlpost.trackers import Trackers, rewind_jsonl

MAIN, OTHER = SimpleNamespace(is_main=True), SimpleNamespace(is_main=False)


def plain(**logging):
    return Recipe(name="run", logging=Logging(tensorboard=False, **logging))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_file_has_one_object_a_line_with_step_and_time(tmp_path):
    tracker = Trackers(tmp_path, plain(), MAIN)
    tracker.log(0, {"reward/mean": 0.5})
    tracker.log(1, {"reward/mean": 0.75})
    rows = lines(tmp_path / "metrics.jsonl")  # before close: nothing waits in a buffer
    tracker.close()
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.5), (1, 0.75)]
    assert rows[0]["unix_s"] <= rows[1]["unix_s"]


def test_what_is_not_finite_becomes_null(tmp_path):
    tracker = Trackers(tmp_path, plain(), MAIN)
    tracker.log(0, {"a": math.nan, "b": math.inf})
    tracker.close()
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert row["a"] is None and row["b"] is None


def test_rewind_leaves_no_gap_and_no_repeat(tmp_path):
    first = Trackers(tmp_path, plain(), MAIN)
    for step in range(5):
        first.log(step, {"x": step})
    first.close()
    resumed = Trackers(tmp_path, plain(), MAIN)
    resumed.rewind(3)
    for step in (3, 4, 5):
        resumed.log(step, {"x": 10 * step})
    resumed.close()
    assert [row["x"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 30, 40, 50]


def test_rewind_drops_what_was_logged_after_the_state_was_saved(tmp_path):
    """An evaluation of the last step is logged at that step, and again by a run that goes on from its checkpoint."""
    first = Trackers(tmp_path, plain(), MAIN)
    first.log(3, {"x": 1.0})
    size = first.settle()
    assert size == (tmp_path / "metrics.jsonl").stat().st_size and first.newest == {}
    first.log(3, {"y": 2.0})
    assert first.newest == {"y": 2.0}
    first.close()
    resumed = Trackers(tmp_path, plain(), MAIN)
    resumed.rewind(4, size)
    resumed.log(3, {"y": 3.0})
    resumed.close()
    assert [row.get("y") for row in lines(tmp_path / "metrics.jsonl")] == [None, 3.0]


def test_figures_before_a_saved_state_are_in_tensorboard_though_the_run_is_killed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Trackers(tmp_path, Recipe(name="run"), MAIN)
    tracker.log(0, {"x": 1.0})
    tracker.settle()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # the writer is still open
    assert [one.value for one in events.Scalars("x")] == [1.0]
    tracker.close()


def test_rewind_drops_a_line_that_was_half_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "re')
    rewind_jsonl(path, 9)
    assert path.read_text() == '{"step": 0}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_rewind_after_log_is_refused(tmp_path):
    tracker = Trackers(tmp_path, plain(), MAIN)
    tracker.log(0, {"x": 0})
    with pytest.raises(RuntimeError, match="before the first log"):
        tracker.rewind(0)
    tracker.close()


def test_other_ranks_write_nothing(tmp_path):
    tracker = Trackers(tmp_path, Recipe(name="run"), OTHER)
    tracker.rewind(0)
    tracker.log(0, {"x": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe(name="run", logging=Logging(tensorboard=True))
    first = Trackers(tmp_path, recipe, MAIN)
    for step in range(4):
        first.log(step, {"x": float(step)})
    first.close()
    time.sleep(1.1)  # files are named by whole seconds and a counter of the process, whose 10 sorts before its 9
    resumed = Trackers(tmp_path, recipe, MAIN)
    resumed.rewind(2)
    resumed.log(2, {"x": 20.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("x")] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_wandb_that_is_not_installed_is_one_clear_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for world in (MAIN, OTHER):
        with pytest.raises(RunError, match=r"logging\.wandb=maths needs the package wandb.*logging\.wandb=null"):
            Trackers(tmp_path, plain(wandb="maths"), world)


def test_wandb_continues_the_same_run_on_our_own_step_axis(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append(("axis", name, step_metric)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish",)),
    )
    module = SimpleNamespace(
        init=lambda **kwargs: calls.append(("init", kwargs["id"], kwargs["resume"])) or run,
        util=SimpleNamespace(generate_id=lambda: f"id{len(calls)}"),
    )
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (0, 1):
        tracker = Trackers(tmp_path, plain(wandb="maths"), MAIN)
        tracker.log(step, {"x": 1.0})
        tracker.close()
    once = [("init", "id0", "allow"), ("axis", "*", "step")]
    first, second = ([*once, ("log", {"step": step, "x": 1.0}), ("finish",)] for step in (0, 1))
    assert calls == first + second
