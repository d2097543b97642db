"""Hints written by a model: resumable, one line a task, from an endpoint or from the recipe's own model."""

from __future__ import annotations

import json

import pytest
from chat_server import chat, question, server
from groups import TASK
from lab import ROOT

from rlpost.__main__ import FAILED, main
from rlpost.errors import RunError
from rlpost.explore._hints import read_hints
from rlpost.types import Task
from rlpost.write_hints import LEVELS, write_hints

TASKS = [TASK, Task("b", "1+1=", answer="2", solution="1+1=2;#2"), Task("c", "2+2=", answer="4", solution="#4")]


class Writer:
    """Says what it was asked, and falls over after so many tasks."""

    def __init__(self, last=100):
        self.asked, self.last = [], last

    def __call__(self, tasks):
        if len(self.asked) + len(tasks) > self.last:
            raise RunError("the server is gone")
        self.asked += tasks
        return [f" hint {len(self.asked)} is 10 " for _ in tasks]


def test_every_task_gets_its_levels_and_leaks_are_marked(tmp_path):
    writer, file = Writer(), tmp_path / "deep/hints.jsonl"
    assert write_hints(TASKS, writer, file, levels=2, chunk=2) == 3
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["key"] for row in rows] == ["a", "b", "c"]
    assert rows[0] == {"key": "a", "hints": ["hint 4 is 10"] * 2, "leaks": [True, True]}
    assert rows[1]["leaks"] == [False, False]
    first, second = (task.prompt for task in writer.asked[:2])
    assert TASK.prompt in first and TASK.solution in first and LEVELS[0] in first and LEVELS[1] in second


def test_a_command_that_was_interrupted_goes_on_with_the_rest(tmp_path):
    file = tmp_path / "hints.jsonl"
    with pytest.raises(RunError, match="gone"):
        write_hints(TASKS, Writer(last=1), file, levels=1, chunk=1)
    file.write_text(file.read_text() + '{"key": "b", "hin')  # killed while it wrote
    writer = Writer()
    assert write_hints(TASKS, writer, file, levels=1, chunk=8) == 2
    assert list(read_hints(file)) == ["a", "b", "c"] and len(writer.asked) == 2
    assert write_hints(TASKS, writer, file, levels=1, chunk=8) == 0


def last_word(path, body, number):
    return chat(question(body).split()[-1])


def no_model(path, body, number):
    return 404, {}, {}


def command(tmp_path, *more):
    config = "tasks.train.config={split: train, size: 3, min_terms: 3, max_terms: 4}"
    return main(["hints", "recipes/quickstart.yaml", config, *more, "--out", str(tmp_path / "hints.jsonl")])


def test_hints_come_from_an_endpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with server(last_word) as (url, _):
        assert command(tmp_path, "--endpoint", f"{url}/v1", "--model", "any", "--levels", "1") == 0
    assert list(read_hints(tmp_path / "hints.jsonl").values()) == [["alone."]] * 3
    assert "(3 tasks are new)" in capsys.readouterr().out
    (tmp_path / "hints.jsonl").unlink()
    with server(no_model) as (url, _):
        assert command(tmp_path, "--endpoint", f"{url}/v1", "--model", "any") == FAILED
    assert f"the endpoint {url}/v1 must answer chat requests for any" in capsys.readouterr().err
    assert command(tmp_path, "--endpoint", url) == FAILED


@pytest.mark.slow
def test_hints_come_from_the_recipes_own_model(single_rank, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    init = {"tokenizer": "byte", "hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
    asked = [
        "generator.kind=hf",
        "sft=null",
        f"model.init={json.dumps(init)}",
        "model.context=1024",
        f"run_dir={tmp_path}",
    ]
    assert command(tmp_path, *asked, "--levels", "1") == 0
    assert len(read_hints(tmp_path / "hints.jsonl")) == 3
