import io
import json
import random
import threading
import time

from rich.console import Console
from runs_made import evaluation, make_run, step_row, write

from rlpost.__main__ import main
from rlpost.history import read_history
from rlpost.watch import sparkline, state, step_seconds, view, watch_run


def shown(folder, now=1.8e9, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(view(read_history(folder), width=width, now=now))
    return console.file.getvalue()


def test_a_finished_run_shows_figures_courses_evaluations_and_that_nothing_is_wrong(tmp_path):
    text = shown(make_run(tmp_path / "run", name="one"))
    assert "one  step 12/12  finished in 0:27" in text
    assert "reward" in text and "▁" in text and "█" in text
    assert "last step: generate 67%, train 33%" in text
    assert "12 steps" in text and "0.800" in text
    assert "no alarm" in text


def test_lines_fit_a_narrow_terminal(tmp_path):
    text = shown(make_run(tmp_path / "run"), width=80)
    assert max(map(len, text.splitlines())) <= 80


def test_an_alarm_says_what_to_do(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    rows = [{**row, "groups/spread_frac": 0.0} for row in read_history(folder).steps]
    write(folder / "metrics.jsonl", rows)
    text = shown(folder)
    assert "alarm at step 5: groups without spread" in text
    assert "curriculum" in text and "no alarm" not in text


def test_the_state_follows_from_what_was_written(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    rows = read_history(folder).rows
    (folder / "recipe.yaml").write_text("name: one\nsteps: 20\n")
    newest = rows[-2]["unix_s"]
    for lines, now, said in (
        ([], newest, "setting up"),
        (rows[:1], rows[0]["unix_s"], "the first step is under way"),
        (rows[:5], rows[4]["unix_s"] + 1, "training, 0:32 left"),
        (rows[:-1], newest + 1000, "no news for 16:40"),
    ):
        write(folder / "metrics.jsonl", lines)
        assert said in state(read_history(folder), now)
    (folder / "recipe.yaml").write_text("name: one\nsteps: 12\n")
    assert "all steps are done" in state(read_history(folder), newest)


def test_the_time_of_a_step_is_the_usual_one(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    rows = read_history(folder).rows
    rows[6] = {**rows[6], "unix_s": rows[6]["unix_s"] + 1.5}
    write(folder / "metrics.jsonl", rows)
    assert step_seconds(read_history(folder)) == 2.0
    write(folder / "metrics.jsonl", rows[:2])
    assert step_seconds(read_history(folder)) is None


def test_names_are_no_markup(tmp_path):
    folder = make_run(tmp_path / "run", name="[red]x[/red]")
    assert "[red]x[/red]" in shown(folder)


def test_a_course_is_as_long_as_there_is_room():
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert sparkline([3.0], 40) == "▁"


def test_once_prints_and_leaves(tmp_path, capsys):
    assert main(["watch", str(make_run(tmp_path / "run", name="one")), "--once"]) == 0
    assert "one  step 12/12" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_run_is_followed_to_its_end(tmp_path):
    folder = make_run(tmp_path / "run", steps=3, finished=False)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    follower = threading.Thread(
        target=watch_run, args=(folder,), kwargs={"every_s": 0.02, "once": False, "console": console}
    )
    follower.start()
    (folder / "recipe.yaml").write_text("name: one\nsteps: 4\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(3, 1.0, random.Random(0))) + "\n")
        file.write(json.dumps(evaluation(3, 0.9)) + "\n")
    time.sleep(0.1)
    assert follower.is_alive()
    (folder / "summary.json").write_text('{"wall_s": 9.0}')
    follower.join(timeout=60)
    assert not follower.is_alive()
    assert "step 4/4  finished in 0:09" in console.file.getvalue()
