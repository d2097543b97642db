from dataclasses import replace

import pytest

from rewards._numbers import as_number
from rewards.boxed_answer import boxed_answer
from rewards.exact_chain import exact_chain
from rewards.final_number import final_number
from rewards.marked_answer import marked_answer
from rlpost.types import Rollout, Task


def rollout(text, answer="72", prompt="7-0+6-3=", solution=None):
    task = Task("a", prompt, answer, solution)
    return Rollout(task, 0, (5,), (5,), (7,), (-0.1,), "stop", 0, text=text)


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("#### 72", "72", 1.0),
        ("6 * 12 = 72\n#### 72", "72", 1.0),
        ("The answer is 72.", "72", 1.0),
        ("so the answer is: $72.00.", "72", 1.0),
        ("THE ANSWER IS **72**", "72", 1.0),
        ("6 * 12 = 72", "72", 1.0),
        ("72", "72", 1.0),
        ("#### 1,234,567", "1234567", 1.0),
        ("#### $1,000", "$1,000", 1.0),
        ("#### -5", "-5", 1.0),
        ("10 - 15 = -5", "-5", 1.0),
        ("10-15=5", "5", 1.0),
        ("#### 0.50", "0.5", 1.0),
        ("#### .5", "0.5", 1.0),
        ("#### 072", "72", 1.0),
        ("", "72", 0.0),
        ("no number at all", "72", 0.0),
        ("####", "72", 0.0),
        ("72 ####", "72", 0.0),
        ("72 is wrong. #### 71", "72", 0.0),
        ("It may be 72 or 73", "72", 0.0),
        ("#### 71 72", "72", 0.0),
        ("#### 71\n#### 72", "72", 1.0),
        ("#### 72\n#### 71", "72", 0.0),
        ("The answer is 71, and 72 is not.", "72", 0.0),
        ("#### 172", "72", 0.0),
        ("#### 72.001", "72", 0.0),
        ("#### 72.0000000000000000000000000001", "72", 0.0),
        ("#### -72", "72", 0.0),
        ("1 2 3 4 71 72 73", "72", 0.0),
        ("#### 7,2", "72", 0.0),
        ("#### seventy-two", "72", 0.0),
        ("#### " + "9" * 10_000, "72", 0.0),
        ("#### \u0667\u0662", "72", 0.0),
        ("The final answer is 20 + 40 + 12 = 72", "72", 1.0),
        ("The final answer is 72 + 0 + 8 = 80", "72", 0.0),
        ("The answer is x = 72.\nThat is 8 = 8.", "72", 1.0),
        ("answer is 72 =", "72", 1.0),
        ("The answer is 72/16", "72", 0.0),
        ("so it is 16/72", "72", 0.0),
        ("The answer is 72 3/4", "72", 0.0),
        ("#### 72 / 6", "72", 0.0),
        ("#### 72 km/h", "72", 1.0),
    ],
)
def test_final_number_table(text, answer, reward):
    assert final_number(rollout(text, answer)) == reward


@pytest.mark.parametrize("answer", [None, "", "a dozen"])
def test_final_number_refuses_tasks_without_a_number(answer):
    with pytest.raises(ValueError, match="number as the answer"):
        final_number(rollout("72", answer))


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        (r"\boxed{72}", "72", 1.0),
        (r"so $\boxed{ 72 }$.", "72", 1.0),
        (r"\boxed{72.0}", "72", 1.0),
        (r"\boxed{$1,000}", "1000", 1.0),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\sqrt{\frac{a}{b}}} and more", r"$\sqrt{\frac{a}{b}}$", 1.0),
        (r"\boxed{71} no, \boxed{72}", "72", 1.0),
        (r"\boxed{x=y}", "x=y", 1.0),
        ("", "72", 0.0),
        ("72", "72", 0.0),
        (r"\boxed{}", "72", 0.0),
        (r"\boxed{72", "72", 0.0),
        (r"\boxed{72} \boxed{", "72", 0.0),
        (r"\boxed{72}, or \boxed{71}", "72", 0.0),
        (r"\boxed{71, 72}", "72", 0.0),
        (r"\boxed{71} 72", "72", 0.0),
        (r"\boxed{7_2}", "72", 0.0),
        (r"\boxed{nan}", "72", 0.0),
        (r"\boxed{$}", "72", 0.0),
        (r"\boxed{72.0000000000000000000000000001}", "72", 0.0),
    ],
)
def test_boxed_answer_table(text, answer, reward):
    assert boxed_answer(rollout(text, answer)) == reward


def test_boxed_answer_strips_what_the_recipe_says():
    assert boxed_answer(rollout(r"\boxed{*x*}", "x")) == 0.0
    assert boxed_answer(rollout(r"\boxed{*x*}", "x"), strip="*") == 1.0


def test_boxed_answer_refuses_tasks_without_an_answer():
    with pytest.raises(ValueError, match="tasks with an answer"):
        boxed_answer(rollout(r"\boxed{1}", None))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7-0=7;7+6=13;13-3=10;#10", 1.0),
        ("7-0=7;7+6=13;13-3=10;#11", 0.0),
        ("7-0=7;7+6=12;12-3=10;#10", 0.0),
        ("7-0=7;7+6=13;13-3=10;#10 ", 0.0),
        ("7-0=7;7+6=13;13-3=10;", 0.0),
        ("#10", 0.0),
        ("10", 0.0),
        ("", 0.0),
    ],
)
def test_exact_chain_table(text, reward):
    assert exact_chain(rollout(text, "10")) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3 * 4 = 12.\n#### 12", 1.0),
        ("#### 9999 \n", 1.0),
        ("#### $1,000.50", 1.0),
        ("#### 12 pens", 0.0),
        ("#### 12\nSo it is 12.", 0.0),
        ("The answer is #### 12", 0.0),
        ("####", 0.0),
        ("12", 0.0),
        ("", 0.0),
    ],
)
def test_marked_answer_table(text, reward):
    assert marked_answer(rollout(text, "12")) == reward


def test_marked_answer_must_end_by_itself():
    cut = replace(rollout("#### 1", "12"), finish_reason="length")
    assert marked_answer(cut) == 0.0


def test_exact_chain_does_not_trust_the_demonstration():
    flawed = "7-0=7;7+6=14;14-3=11;#11"
    assert exact_chain(rollout(flawed, "10", solution=flawed)) == 0.0


@pytest.mark.parametrize("text", ["", "72 apples", "1e3", "1_000", "nan", "1,00", "--1", "1.2.3"])
def test_as_number_refuses_what_is_more_than_a_number(text):
    assert as_number(text) is None
