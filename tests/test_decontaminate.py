"""Training tasks like held-out ones: runs of words, near-duplicates; filters by column, difficulty and length."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from rlpost.decontaminate import decontaminated, overlaps
from rlpost.errors import RunError
from rlpost.task_filters import kept, of_length
from rlpost.task_options import text_of_report
from rlpost.task_recipe import Decontaminate, Keep, TaskSource
from rlpost.task_report import report_of
from rlpost.types import Task

HELD = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"
COPY = "Anna sold clips to 48 of her friends in April, and then she sold half as many clips in May. What was her total?"
NEAR = HELD.replace("48", "96")
OTHER = "A train leaves the station at nine with three coaches and comes back at noon with two. How many are missing?"


def task(key, prompt, **more):
    return Task(key, prompt, source="s", **more)


def test_a_run_of_words_in_common_is_found_with_its_share():
    [found] = overlaps([task("copy", COPY), task("other", OTHER)], [task("h", HELD)], Decontaminate(ngram=13))
    assert (found.train, found.held_out, found.kind) == ("copy", "h", "ngram")
    runs = 27 - 13 + 1  # of the held-out problem's 27 words, punctuation counted; 21 in a row are shared
    assert found.share == pytest.approx((21 - 13 + 1) / runs) and found.text in COPY.casefold().replace(",", " ,")


def test_a_problem_shorter_than_the_run_is_compared_as_a_whole():
    asked = Decontaminate(ngram=13)
    assert not overlaps([task("a", "9-7-0+6=")], [task("h", "7-0+6=")], asked)
    [found] = overlaps([task("a", "What  IS 2+2?")], [task("h", "What is 2 + 2 ?")], asked)
    assert found.share == 1.0


def test_near_texts_are_found_where_numbers_differ():
    [found] = overlaps([task("near", NEAR), task("other", OTHER)], [task("h", HELD)], Decontaminate(near=0.7))
    assert (found.train, found.kind) == ("near", "near") and found.share > 0.7
    assert not overlaps([task("near", NEAR)], [task("h", HELD)], Decontaminate())


def test_they_are_left_out_or_refused(caplog):
    train, held = [task("copy", COPY), task("other", OTHER)], [task("h", HELD)]
    with caplog.at_level(logging.WARNING):
        assert decontaminated(train, held, Decontaminate(ngram=13)) == train[1:]
    assert "left out 1 of 2 training tasks (copy is like h" in caplog.text
    with pytest.raises(RunError, match=r"tasks\.decontaminate: no training task may be like .* 1 of 2"):
        decontaminated(train, held, Decontaminate(ngram=13, found="refuse"))
    with pytest.raises(RunError, match="must leave a training task"):
        decontaminated(train[:1], held, Decontaminate(ngram=13))
    assert decontaminated(train, held, Decontaminate()) == train


def test_filters_keep_what_they_are_asked_for(tmp_path):
    tasks = [task(f"t{i}", f"p {i}", extra={"kind": "xy"[i % 2], "level": i}) for i in range(6)]
    assert [one.key for one in kept(tasks, Keep(where={"kind": "x"}), "tasks.train")] == ["t0", "t2", "t4"]
    asked = Keep(where={"kind": ["x", "y"], "level": [1, 2, 5]}, difficulty="level", min_difficulty=2)
    assert [one.key for one in kept(tasks, asked, "tasks.train")] == ["t2", "t5"]
    file = tmp_path / "difficulty.jsonl"
    file.write_text("".join(json.dumps({"key": f"t{i}", "difficulty": i / 4}) + "\n" for i in range(4)))
    asked = Keep(difficulty=str(file), min_difficulty=0.25, max_difficulty=0.5)
    assert [one.key for one in kept(tasks, asked, "tasks.train")] == ["t1", "t2"]
    with pytest.raises(RunError, match=r"tasks\.train\.keep\.where must leave at least one task \(none of 6"):
        kept(tasks, Keep(where={"kind": "z"}), "tasks.train")


def test_length_is_that_of_the_prompt_as_the_model_sees_it():
    tasks = [Task("a", "xx", source="s"), Task("b", "xxxx", source="s"), Task("c", "xxxxxx", source="r")]
    renderer = SimpleNamespace(prompt_ids=lambda one: (*one.prompt, "end"), context=100)
    sources = {
        "tasks.train": TaskSource(path="s", keep=Keep(min_tokens=4, max_tokens=5)),
        "tasks.more.0": TaskSource(path="r"),
    }
    assert [one.key for one in of_length(tasks, sources, renderer)] == ["b", "c"]


def test_the_report_counts_what_each_step_leaves_out(tmp_path, monkeypatch):
    from rlpost.check import load_and_check

    monkeypatch.chdir(tmp_path)
    rows = [{"q": text, "a": "72", "kind": "x"} for text in (COPY, OTHER, OTHER)]
    rows += [{"q": f"{OTHER} {i}", "a": "five", "kind": "y"} for i in range(2)]
    for name, some in (("t", rows), ("e", [{"q": HELD, "a": "72"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "r.yaml").write_text(
        "model: {init: {tokenizer: byte}}\nrewards: [{use: final_number}]\ntasks:\n"
        "  train: {path: t.jsonl, prompt: q, answer: a, duplicates: drop, extra: [kind]}\n"
        "  eval: {path: e.jsonl, prompt: q, answer: a}\n  decontaminate: {ngram: 13}\n"
    )
    report = report_of(load_and_check("r.yaml"))
    source = report["sources"]["tasks.train"]
    assert (source["rows"], source["distinct"], source["kept"], source["used"]) == (5, 4, 4, 3)
    assert source["numeric_answers_frac"] == 0.5 and source["columns"] == {"kind": {"x": 2, "y": 2}}
    assert report["funnel"] == {"of all sources": 4, "not held out": 4, "decontaminated": 3}
    assert report["overlap"]["tasks"] == {"ngram": 1, "near": 0} and report["near_duplicates"]["tasks"] == 2
    text = text_of_report(report)
    assert "rows 5, distinct 4, kept 4, used 3" in text and "1 tasks share a run of 13 words" in text
