"""maj@k against every choice of k answers; which answer a rollout gives."""

from itertools import combinations

import pytest

from rlpost.errors import RecipeError
from rlpost.types import Rollout, Task
from rlpost.votes import boxed_of, majority_at_k, number_of, voter


def brute(votes, n, k):
    """The mean over all choices of k of n samples; a tie is a fair draw among the most frequent."""
    answers = [place for place, (count, _) in enumerate(votes) for _ in range(count)]
    answers += [None] * (n - len(answers))
    total, choices = 0.0, list(combinations(range(n), k))
    for choice in choices:
        said = [answers[i] for i in choice if answers[i] is not None]
        most = max((said.count(one) for one in said), default=0)
        first = {one for one in said if said.count(one) == most}
        total += sum(votes[one][1] for one in first) / len(first) if first else 0.0
    return total / len(choices)


@pytest.mark.parametrize(
    "votes",
    [
        [],
        [[3, 1]],
        [[3, 0], [2, 1]],
        [[2, 1], [2, 0], [2, 0]],
        [[1, 1], [1, 0], [1, 0], [1, 0]],
        [[2, 1], [2, 1], [3, 0]],
        [[4, 0], [1, 1], [3, 0]],
    ],
)
@pytest.mark.parametrize("n", [8, 9])
def test_majority_is_the_mean_over_all_choices(votes, n):
    for k in range(1, n + 1):
        assert majority_at_k(votes, n, k) == pytest.approx(brute(votes, n, k), abs=1e-12), k


def test_majority_of_many_samples_is_a_probability():
    assert majority_at_k([[200, 1], [190, 0], [5, 0]], 400, 64) == pytest.approx(0.63, abs=0.1)
    assert majority_at_k([[1, 1]] + [[1, 0]] * 1023, 1024, 64) == pytest.approx(1 / 1024, rel=1e-9)


def rollout(text):
    return Rollout(Task("a", "p", "72"), 0, (1,), (1,), (2,), (-1.0,), "stop", 0, text=text)


def test_answers_that_mean_the_same_are_one_vote():
    assert number_of(rollout("#### 72.0")) == number_of(rollout("The answer is 72."))
    assert number_of(rollout("none")) is None
    assert boxed_of(rollout(r"\boxed{1,000}")) == boxed_of(rollout(r"so \boxed{1000.0}"))
    assert boxed_of(rollout(r"\boxed{\frac{1}{2}}")) == r"\frac{1}{2}" and boxed_of(rollout("1")) is None


def test_the_first_reward_says_what_is_voted_for_unless_the_recipe_does():
    assert voter(None, "final_number") is number_of and voter("boxed_answer", "final_number") is boxed_of
    assert voter(None, "exact_chain") is None
    with pytest.raises(RecipeError, match=r"evaluation\.vote"):
        voter("final_numbr", "exact_chain")
