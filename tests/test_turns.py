"""The rollout functions that ship with rlpost."""

from __future__ import annotations

import json
import re

import pytest
from groups import Letters
from lab import make_lab, train_here
from test_lockstep import END, Scripted

from rlpost.collect import answers
from rlpost.recipe import Recipe
from rlpost.rollout_recipe import bind_rollout, rollout_problems
from rlpost.turns.calculator import calculate
from rlpost.types import Request, Sampling, Task


def lead(section, replies, *, max_new_tokens=2000):
    """The one answer whose turns say `replies`, led by what a recipe's section names."""
    said = iter(replies)
    generator, renderer = Scripted(lambda prompt, i: next(said)), Letters()
    renderer.context = 4000
    sampling = Sampling(max_new_tokens, stop_ids=(END,), rollout=bind_rollout(Recipe(rollout=section)))
    [one] = answers(generator, renderer, [Request(0, Task("a", "?"), (1,), 1, seed=0)], sampling)
    return one


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*7", "84"),
        (" 48 + 92-15 ", "125"),
        ("-(2-5)**3", "27"),
        ("7//2 + 7%4", "6"),
        ("2**-2", "0.25"),
        ("1/3*3", "1"),
        ("1e3", "1000"),
        ("10**60", "1" + "0" * 60),
        ("-7//2", "-4"),
    ],
)
def test_arithmetic_is_exact(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "4+", "1/0", "1%0", "0**-1", "a+1", "abs(1)", "__import__('os')", "(1).real", "1 if 1 else 2", "True"),
        *("9**9**9", "10**61", "2**0.5", "1e999", "1j", "'a'*9", "[1]", "1<2", "~1", "1<<9", "x:=1", "9" * 201),
        *("(" * 100 + "1" + ")" * 99, "1;2", "lambda: 1", "\0"),
    ],
)
def test_what_is_no_arithmetic_or_too_large_is_refused(text):
    with pytest.raises(ValueError):
        calculate(text)


def test_the_deepest_expression_is_calculated():
    assert calculate("-" * 199 + "1") == "-1"
    assert calculate("+".join("1" * 100)) == "100"


def test_the_calculator_answers_each_call_and_says_where_it_cannot():
    one = lead({"use": "calculator"}, ["so <calc>6*7</calc>", " and <calc>6/0</calc>", " and </calc>", " end"])
    error = "<result>error</result>"
    assert one.text == (
        f"so <calc>6*7</calc><result>42</result> and <calc>6/0</calc>{error} and </calc>{error} end\0"
    )  # fmt: skip
    assert [turn.error for turn in one.turns if turn.writer == "tool"] == [False, True, True]


def test_after_the_last_call_the_policy_writes_on_without():
    one = lead({"use": "calculator", "max_calls": 1}, ["<calc>1+1</calc>", "<calc>2+2</calc> and on"])
    assert one.text == "<calc>1+1</calc><result>2</result><calc>2+2</calc> and on\0" and len(one.turns) == 3


def test_the_python_sandbox_says_what_a_program_prints_and_complains_of():
    section = {"use": "python", "max_chars": 40, "sandbox": "limits"}
    said = ["<python>print(6*7)</python>", "<python>print(1); {}['a']</python>", "</python>", "<python>print('x'*99)"]
    one = lead(section, [*said[:3], said[3] + "</python>", "#"])
    tools = [(turn.text, turn.error) for turn in one.turns if turn.writer == "tool"]
    assert tools == [
        ("<output>42</output>", False),
        ("<output>1\nKeyError: 'a'</output>", True),
        ("<output>no <python></output>", True),
        (f"<output>{'x' * 40}</output>", False),
    ]


def test_the_python_sandbox_ends_what_takes_too_long():
    section = {"use": "python", "seconds": 0.5, "sandbox": "limits"}
    one = lead(section, ["<python>while True: pass</python>", "#"])
    assert (one.turns[1].text, one.turns[1].error) == ("<output>too slow</output>", True)


LEADS = "rollout={use: calculator, begin: '+', end: '=', result: '{};', error: '#'}"


def figures(lines):
    """Of each step; an evaluation more is in the totals."""
    evaluated = ("total/tokens/evaluated", "total/flops/evaluate")
    steps = [line for line in lines if "eval/n" not in line]
    return [{name: x for name, x in line.items() if name not in evaluated} for line in steps]


@pytest.mark.slow
def test_a_run_led_by_a_calculator_trains_what_the_policy_wrote_and_resumes_exactly(single_rank, tmp_path):
    lab = make_lab(tmp_path)
    held_out = "{path: 'rlpost.testbed:chain_sums', config: {split: eval, size: 4, min_terms: 2, max_terms: 3}}"
    asked = [LEADS, "sft=null", "algorithm.groups.without_spread=keep", "save_every=2", f"tasks.eval={held_out}"]
    whole = train_here(lab, single_rank, "whole", *asked)
    train_here(lab, single_rank, "parts", *asked, "steps=2")
    parts = train_here(lab, single_rank, "parts", *asked, "steps=4", "resume=auto")
    assert figures(whole) == figures(parts)
    steps = [line for line in whole if "tokens/trained" in line]
    for line in steps:
        length = line["rollouts/length_mean"] * line["rollouts/num"]
        assert line["tools/length"] >= line["tools/calls"] >= line["tools/errors"] > 0
        assert line["tokens/trained"] == line["tokens/generated"] - line["tokens/discarded"]
        assert length == pytest.approx(line["tokens/generated"] + line["tools/length"] * line["rollouts/num"])
        assert line["rollouts/length_max"] <= 24
    rows = [json.loads(row) for row in (lab / "runs/whole/samples.jsonl").read_text().splitlines()]
    told = [turn for row in rows for turn in row["turns"] if turn["writer"] == "tool"]
    assert told and all("".join(turn["text"] for turn in row["turns"]) == row["completion"] for row in rows)
    assert any(line.get("eval/length_mean", 0) > 0 for line in whole)


PLUGINS = '''
def plain(talk):
    """Not to be awaited."""


class Leads:
    async def __call__(self, talk): ...


async def mine(talk, *, tries: int = 2): ...


async def lonely(): ...
'''


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    (tmp_path / "turnlab.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"use": "calculater"}, r"^rollout.use: rlpost.turns/ has no `calculater`, did you mean `calculator`\?"),
        ({"use": "calculator", "max_call": 3}, r"^rollout.max_call: .*did you mean `max_calls`\?"),
        ({"use": "calculator", "max_calls": "many"}, r"^rollout.max_calls must be int \(got 'many'\)"),
        ({"use": "calculator", "talk": 1}, "^rollout.talk is given by the run"),
        ({}, "^rollout.use must name a plug-in"),
        ({"use": "turnlab:plain"}, r"^rollout.use must be a coroutine function.*\(got a plain function, `turnlab:pla"),
        ({"use": "turnlab:Leads"}, "^rollout: `turnlab:Leads` must take 1 positional argument"),
        ({"use": "turnlab:lonely"}, "^rollout: `turnlab:lonely` must take 1 positional argument"),
    ],
)
def test_check_names_what_is_wrong_with_the_section(mylab, section, message):
    [problem] = rollout_problems(Recipe(rollout=section))
    assert re.search(message, problem), problem


def test_a_function_of_a_user_s_is_bound_and_interruption_refused(mylab):
    recipe = Recipe(rollout={"use": "turnlab:mine", "tries": 3})
    assert rollout_problems(recipe) == [] and rollout_problems(Recipe()) == [] and bind_rollout(Recipe()) is None
    recipe.algorithm.interruption.text = "enough"
    [problem] = rollout_problems(recipe)
    assert problem.startswith("algorithm.interruption.text must be null with rollout (got both)")
    recipe.algorithm.interruption.text, recipe.generator.partial_tokens = None, 8
    [problem] = rollout_problems(recipe)
    assert problem.startswith("generator.partial_tokens must be null with rollout (got 8)")
