"""Stages and filters of synthesis one by one, with writers that say what a test tells them; the endpoint is real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_server import chat, question, server
from test_readme import README, blocks

from rlpost.errors import RunError
from rlpost.generate.writers import Ask, Endpoint, Written
from rlpost.recipe import load
from rlpost.synth.filters.agreement import agreement
from rlpost.synth.filters.judge import Judge
from rlpost.synth.filters.policy import Policy
from rlpost.synth.filters.rules import rules
from rlpost.synth.filters.solution_rules import solution_rules
from rlpost.synth.stages.measured import measured
from rlpost.synth.stages.pass_rate import pass_rate
from rlpost.synth.stages.probe import probe
from rlpost.synth.stages.teacher import teacher
from rlpost.types import Sampling, Task

ROOT = Path(__file__).parents[1]
END = 7


class Scripted:
    """Says by its prompt what it was told to, in reverse order, as quick answers overtake slow ones."""

    stop_ids = (1,)
    renderer = SimpleNamespace(text_ids=lambda text: (END,) if text == "</think>" else (1, 2))

    def __init__(self, said):
        self.said, self.asked = said, []

    def stream(self, asks, sampling, *, first=0):
        self.asked = list(asks)
        for ask in reversed(self.asked):
            yield ask, self.said[ask.task.prompt]


def bench(said):
    writer = Scripted(said)
    recipe = load(ROOT / "recipes/scalediff_testbed.yaml")
    return SimpleNamespace(
        recipe=recipe, seed=3, writer=lambda *_: writer, local=lambda *_, **__: writer, scripted=writer
    )


def texts(*said, finish="stop"):
    return [Written(text, finish) for text in said]


def test_difficult_is_what_is_seldom_solved():
    said = {"1+1=": texts("2", "2", "3", "2"), "2+2=": texts("4", "5", "6", "7")}
    rows = [{"id": "a", "prompt": "1+1=", "answer": "2"}, {"id": "b", "prompt": "2+2=", "answer": "4"}]
    found = {row["id"]: row for row in pass_rate(rows, bench(said), n=4, at_least=0.7)}
    assert (found["a"]["score"], found["a"]["difficult"]) == (0.25, False)
    assert (found["b"]["score"], found["b"]["difficult"], found["b"]["tries"]) == (0.75, True, 4)


def test_the_probe_goes_by_the_likeliest_first_token_or_by_its_probability():
    easy = [Written("", "length", first={END: math.log(0.6), 3: math.log(0.4)})]
    hard = [Written("", "length", first={END: math.log(0.3), 3: math.log(0.7)})]
    rows = [{"id": "a", "prompt": "easy"}, {"id": "b", "prompt": "hard"}, {"id": "c", "prompt": "long"}]
    said = {"easy": easy, "hard": hard, "long": [Written("", "too_long")]}
    found = {row["id"]: row for row in probe(rows, bench(said), model="any")}
    assert [found[id]["difficult"] for id in "abc"] == [False, True, False]
    assert found["b"]["score"] == pytest.approx(0.7) and found["c"]["score"] is None
    softly = {row["id"]: row["difficult"] for row in probe(rows, bench(said), model="any", at_least=0.35)}
    assert softly == {"a": True, "b": True, "c": False}
    with pytest.raises(RunError, match="one token of any"):
        list(probe(rows, bench(said), model="any", token="</thought>"))


def test_a_file_says_how_difficult_tasks_are_by_mean_or_by_item_response_theory(tmp_path):
    file = tmp_path / "difficulty.jsonl"
    lines = [
        {"key": key, "model": model, "passes": passes, "tries": 8, "difficulty": 1 - passes / 8}
        for model, counts in (("weak", (6, 1, 0)), ("strong", (8, 6, 2)))
        for key, passes in zip("abc", counts, strict=True)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"id": key} for key in "abcd"]
    found = list(measured(rows, None, path=str(file), at_least=0.5))
    assert [row["difficult"] for row in found] == [False, True, True, False]
    assert found[1]["score"] == pytest.approx(1 - 7 / 16)
    easy, middle, hard, unknown = measured(rows, None, path=str(file), by="irt", at_least=0.0)
    assert easy["score"] < middle["score"] < hard["score"] and unknown["score"] is None


def test_the_teachers_reasoning_is_kept_apart_and_a_cut_text_has_no_answer():
    said = {"Q: x": [*texts("<think>hm 9</think>It is \\boxed{7}."), *texts("so \\boxed{7} and", finish="length")]}
    [row] = teacher([{"id": "a", "prompt": "x"}], bench(said), k=2, prompt="Q: {problem}")
    assert row["solutions"][0] == {
        "reasoning": "hm 9",
        "text": "It is \\boxed{7}.",
        "answer": "7",
        "finish": "stop",
    }
    assert row["solutions"][1]["answer"] is None and row["prompt"] == "x"


@pytest.mark.parametrize(
    ("prompt", "finish", "reason"),
    [
        ("What is 2 + 2?", "stop", None),
        ("What is", "length", "cut off"),
        ("x?", "stop", "too short"),
        ("y" * 8001, "stop", "too long"),
        ("We get " * 6, "stop", "repetition"),
        ("a" * 60, "stop", "repetition"),
        ("Was ist die Summe von 3 und 4, wenn man sie addiert?", "stop", None),
        ("求 x 的值 若 2x = 4", "stop", "language"),
    ],
)
def test_rules_of_problems(prompt, finish, reason):
    assert rules({"prompt": prompt, "finish": finish}, language="latin") == reason


def solved(*answers, finish="stop", prompt="What is it?"):
    one = [{"text": f"so {answer}", "reasoning": "", "answer": answer, "finish": finish} for answer in answers]
    return {"id": "a", "prompt": prompt, "seed": 1, "solutions": one}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (solved("7", "8"), None),
        (solved(None, None), "no final answer"),
        (solved(None, None, finish="length"), "solution cut off"),
        (solved(None, finish="too_long"), "problem too long for the teacher"),
        (solved("1234", prompt="Show that x is 1234."), "answer in the problem"),
        (solved("12", prompt="12 trains leave."), None),
    ],
)
def test_rules_of_solutions(row, reason):
    assert solution_rules(row) == reason


def test_agreement_counts_equal_numbers_and_refuses_ties():
    said = "the teacher does not agree with itself"
    assert agreement(solved("8", "8.0", "9")) is None
    assert agreement(solved("8", "8.0", "9"), at_least=0.7) == said
    assert agreement(solved("8", "9")) == agreement(solved("8", "8", "9", "9"), at_least=0.5) == said
    assert agreement(solved("8")) is None


def test_the_student_filter_keeps_what_is_solved_sometimes():
    said = {"always": texts("5", "5"), "never": texts("6", "6"), "sometimes": texts("5", "6")}
    rows = [{**solved("5", prompt=prompt), "id": prompt} for prompt in said]
    found = {row["id"]: row for row in Policy(bench(said), n=2).stream(rows)}
    assert found["always"]["reason"] == "the student solves it"
    assert found["never"]["reason"] == "no answer of the student is right"
    assert found["sometimes"]["reason"] is None and found["sometimes"]["passes"] == 1
    published = {row["id"]: row["reason"] for row in Policy(bench(said), n=2, solvable=False).stream(rows)}
    assert published["never"] is None


def test_the_judge_needs_a_majority_and_a_verdict():
    ask = "{problem}"
    said = {
        "good": texts("VERDICT: yes", "VERDICT: no, wait. VERDICT: yes", "VERDICT: no"),
        "bad": texts("VERDICT: no", "verdict: NO", "VERDICT: yes"),
        "silent": texts("hm", "hm", "hm"),
    }
    rows = [{"id": prompt, "prompt": prompt} for prompt in said]
    found = {row["id"]: row["reason"] for row in Judge(bench(said), prompt=ask, votes=3).stream(rows)}
    assert found == {"good": None, "bad": "ill-posed", "silent": "the judge says nothing"}


def test_the_stage_of_the_readme_is_a_stage():
    names: dict = {}
    exec(next(block for block in blocks(README, "python") if "def by_length" in block), names)
    rows = [{"id": "a", "prompt": "x" * 5}, {"id": "b", "prompt": "x"}]
    assert [row["difficult"] for row in names["by_length"](rows, None, at_least=5)] == [True, False]


def reason(path, body, number):
    """A reasoning model: as many answers as were asked for."""
    if question(body) == "broken":
        return 400, {}, {}
    return chat(*[f"{question(body)} \\boxed{{{body['seed']}}}"] * body["n"], reasoning_content="hm")


@pytest.fixture
def served():
    with server(reason) as (url, _):
        yield f"{url}/v1"


def test_an_endpoint_answers_in_any_order_and_a_failure_names_it(served):
    endpoint = Endpoint(served, "any", at_once=3)
    asks = [Ask(str(i), Task(str(i), f"task {i}"), n=2, seed=i) for i in range(8)]
    found = {ask.id: written for ask, written in endpoint.stream(iter(asks), Sampling(16))}
    assert {id: one[0].text for id, one in found.items()} == {str(i): f"task {i} \\boxed{{{i}}}" for i in range(8)}
    assert all(len(one) == 2 and one[0].reasoning == "hm" for one in found.values())
    with pytest.raises(RunError, match=f"the endpoint {served} must answer"):
        list(endpoint.stream([Ask("x", Task("x", "broken"))], Sampling(16)))
    endpoint.close()
