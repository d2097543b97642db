import json

import pytest
from runs_made import make_run

from rlpost.errors import RunError
from rlpost.history import lines_of, read_history


def test_a_finished_run_is_read_whole(tmp_path):
    history = read_history(make_run(tmp_path / "run", name="one", steps=5))
    assert (history.name, history.total_steps, len(history.steps)) == ("one", 5, 5)
    assert [(done, row["eval/pass@1"]) for done, row in history.evaluations] == [(0, 0.4), (5, 0.8)]
    assert history.summary is not None and history.recipe["engine"]["lr"] == 1e-6


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run", steps=3, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/me')
    history = read_history(folder)
    assert len(history.steps) == 3 and history.summary is None


def test_a_run_that_has_logged_nothing_yet_is_a_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: new\nsteps: 7\n")
    history = read_history(tmp_path)
    assert (history.rows, history.evaluations, history.total_steps) == ([], [], 7)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "must be the folder of a run"),
        ({"metrics.jsonl": '{"step": 0}\nnot json\n{"step": 1}\n'}, "line 2"),
        ({"metrics.jsonl": '{"reward/mean": 1.0}\n'}, "`step`"),
        ({"summary.json": "{"}, "summary.json must be JSON"),
        ({"recipe.yaml": "a: [1"}, "recipe.yaml must be YAML"),
    ],
)
def test_what_is_no_run_is_one_message(tmp_path, files, message):
    folder = tmp_path / "run"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    with pytest.raises(RunError, match=message):
        read_history(folder)


def test_bytes_that_are_no_text_do_not_stop_a_reader(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(json.dumps({"step": 0, "completion": "XX"}).encode().replace(b"XX", b"\xff\xfe") + b"\n")
    [row] = lines_of(file)
    assert row["completion"] == "\N{REPLACEMENT CHARACTER}" * 2
