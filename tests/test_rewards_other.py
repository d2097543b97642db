"""Case tables of the rewards for form, length, language and repetition, with answers that are meant to cheat."""

from dataclasses import replace

import pytest
from test_rewards import rollout

from rewards.exact_answer import exact_answer
from rewards.format_tags import format_tags
from rewards.language import language
from rewards.length_budget import length_budget
from rewards.length_cosine import length_cosine
from rewards.length_kimi import length_kimi
from rewards.length_overlong import length_overlong
from rewards.reasoning_gym_score import reasoning_gym_score
from rewards.repetition import repetition
from rlpost.types import Group


def long(length, *, passed=True, truncated=False):
    """An answer of so many tokens."""
    one = replace(rollout("x"), token_ids=tuple(range(length)), behavior_logp=(0.0,) * length)
    return replace(one, reward_parts={"right": float(passed)}, finish_reason="length" if truncated else "stop")


def grouped(*rollouts, **extra):
    return Group(0, replace(rollouts[0].task, extra=extra), list(rollouts))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("72", 1.0),
        (" 72\n", 1.0),
        ("72.0", 0.0),
        ("72 72", 0.0),
        ("the answer is 72", 0.0),
        ("", 0.0),
        ("#### 72", 0.0),
    ],
)
def test_exact_answer_table(text, reward):
    assert exact_answer(rollout(text)) == reward


@pytest.mark.parametrize(
    ("text", "reward"), [("71 #### 72", 1.0), ("#### 72 #### 71", 0.0), ("72", 0.0), ("####", 0.0)]
)
def test_exact_answer_after_a_mark_table(text, reward):
    assert exact_answer(rollout(text), after="####") == reward


def test_exact_answer_by_case_and_without_an_answer():
    assert exact_answer(rollout("Paris", "paris")) == 0.0
    assert exact_answer(rollout("Paris", "paris"), casefold=True) == 1.0
    with pytest.raises(ValueError, match="tasks with an answer"):
        exact_answer(rollout("1", None))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a\nb</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<think> \n</think><answer>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b</answer> and more", 0.0),
        ("more <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> between <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a<think>b</think><answer>c</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_tags_table(text, reward):
    assert format_tags(rollout(text)) == reward


def test_format_tags_that_the_prompt_has_begun_and_that_were_cut_off():
    text = "a</think><answer>b</answer>"
    assert format_tags(rollout(text), begun=True) == 1.0 and format_tags(rollout(text)) == 0.0
    assert format_tags(replace(rollout(f"<think>{text}"), finish_reason="length")) == 0.0


@pytest.mark.parametrize(
    ("tokens", "reward"),
    [((1, 2, 3, 4, 5), 0.0), ((1, 1, 1, 1, 1), -0.75), ((1, 2, 1, 2, 1), -0.5), ((1,), 0.0), ((), 0.0)],
)
def test_repetition_table(tokens, reward):
    assert repetition(replace(rollout("x"), token_ids=tokens), n=2) == reward


def test_repetition_of_words_and_what_is_free():
    one = rollout("Wait, no. wait, no. WAIT, no.")
    assert repetition(one, n=2, unit="words") == pytest.approx(-3 / 5)
    assert repetition(one, n=2, unit="words", free=0.6) == 0.0
    assert repetition(one, n=2, unit="words", most=0.1) == pytest.approx(-0.06)
    with pytest.raises(ValueError, match="tokens or words"):
        repetition(one, unit="letters")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("So x = 5.", 1.0),
        ("\u4e2d\u6587", 0.0),
        ("ab\u4e2d\u6587", 0.5),
        ("", 1.0),
        ("12 + 3", 1.0),
        ("\u03b1 = 2a", 1.0),
    ],
)
def test_language_table(text, share):
    assert language(rollout(text)) == share
    assert language(rollout(text), at_least=0.9) == (share if share >= 0.9 else 0.0)


@pytest.mark.parametrize(("length", "reward"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (500, -1.0)])
def test_length_overlong_table(length, reward):
    assert length_overlong(long(length), limit=100, buffer=20) == reward


def test_length_kimi_table():
    group = grouped(long(10), long(20), long(30), long(10, passed=False), long(30, passed=False))
    assert length_kimi(group) == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert length_kimi(grouped(long(5), long(5))) == [0.0, 0.0]


def test_length_cosine_table():
    lengths = [long(0), long(50), long(0, passed=False), long(50, passed=False), long(100), long(200, passed=False)]
    assert length_cosine(grouped(*lengths), limit=100) == pytest.approx([2.0, 1.5, -10.0, -5.0, -10.0, -10.0])


def test_length_budget_table():
    group = grouped(long(100), long(200), long(100, passed=False), budget=150)
    assert length_budget(group, alpha=0.01) == pytest.approx([-0.5, -0.5, -0.5])
    assert length_budget(group, alpha=0.01, mode="max") == pytest.approx([0.0, -1.0, 0.0])
    with pytest.raises(ValueError, match="exact or max"):
        length_budget(group, mode="min")
    with pytest.raises(ValueError, match="column 'budget'"):
        length_budget(grouped(long(1)))


METADATA = {"source_dataset": "chain_sum", "source_index": 0}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>72</answer>", 1.0),
        ("<answer>71</answer><answer>72</answer>", 1.0),
        (r"\boxed{72}", 1.0),
        ("The answer is 72.", 1.0),
        ("<answer>72</answer><answer>71</answer>", 0.0),
        ("<answer>71 72</answer>", 0.4),  # what reasoning_gym itself gives for it
        ("<answer>the answer</answer>", 0.0),
        ("72", 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_gym_score_table(text, reward):
    one = rollout(text)
    one.task = replace(one.task, extra={"metadata": METADATA})
    assert reasoning_gym_score(one).value == reward


def test_reasoning_gym_score_needs_the_metadata():
    with pytest.raises(ValueError, match=r"extra: .metadata."):
        reasoning_gym_score(rollout("72"))
