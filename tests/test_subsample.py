"""Inclusion probabilities by hand, the draw by enumeration, and the gradient of all N from m of them.

The draw has finitely many orders, and for each of them finitely many intervals of the start between which the sample
does not change: expectations over it are sums, exact to rounding.
"""

import math
from functools import partial
from itertools import pairwise, permutations
from random import Random

import pytest
import torch

from rlpost.advantages import dr_grpo, grpo, rloo
from rlpost.subsample import at_start, balanced_inclusion, spread_inclusion, systematic, uniform_inclusion

YES, NO = True, False


def samples(pi):
    """Every sample of `systematic` with its probability."""
    orders = list(permutations(range(len(pi))))
    for order in orders:
        ends = [math.fsum(pi[i] for i in order[: n + 1]) % 1.0 for n in range(len(order))]
        starts = sorted({0.0, 1.0, *ends})
        for low, high in pairwise(starts):
            if high - low > 1e-12:
                yield at_start(pi, order, (low + high) / 2), (high - low) / len(orders)


def found_inclusion(pi, draws):
    """How often each rollout is in the samples of (indices, probability)."""
    found = [0.0] * len(pi)
    for indices, probability in draws:
        for i in indices:
            found[i] += probability
    return found


# The rules.


@pytest.mark.parametrize(
    ("num", "keep", "expected"),
    [(4, 1, [0.25] * 4), (4, 3, [0.75] * 4), (3, 3, [1.0] * 3), (2, 5, [1.0] * 2), (0, 2, [])],
)
def test_uniform_inclusion_matches_hand_table(num, keep, expected):
    assert uniform_inclusion(num, keep) == expected


@pytest.mark.parametrize(
    ("passed", "keep", "expected"),
    [
        ([YES, NO, NO, NO, NO, NO, NO], 4, [1.0, *[3 / 6] * 6]),  # few successes: all of them
        ([NO, YES, YES, YES, YES, YES, YES], 4, [1.0, *[3 / 6] * 6]),  # few failures: all of them
        ([YES, YES, YES, NO, NO, NO, NO], 4, [*[2 / 3] * 3, *[2 / 4] * 4]),  # enough of both: half and half
        ([YES, YES, YES, NO, NO, NO, NO], 5, [*[1.0] * 3, *[2 / 4] * 4]),  # m odd: the odd place is a success's
        ([NO, NO, NO, NO], 2, [0.5] * 4),
        ([YES, YES, YES, YES], 3, [0.75] * 4),
        ([YES, NO, NO], 3, [1.0] * 3),
        ([YES, NO, NO], 8, [1.0] * 3),
        ([YES, None, NO, NO, None, NO], 2, [1.0, 0.0, 1 / 3, 1 / 3, 0.0, 1 / 3]),
        ([YES, None, NO], 2, [1.0, 0.0, 1.0]),
        ([None, YES, None], 2, [0.0, 1.0, 0.0]),
        ([None, None], 2, [0.0, 0.0]),
        ([], 2, []),
    ],
)
def test_balanced_inclusion_matches_hand_table(passed, keep, expected):
    assert balanced_inclusion(passed, keep) == expected


@pytest.mark.parametrize(
    ("rewards", "keep", "expected"),
    [
        ([1.0, 0.0, 0.0, 0.0], 2, [1.0, *[1 / 3] * 3]),  # 3/4, 1/4, ...: 2 * 3 / 6 is just 1
        ([1.0, 0.0, 0.0, 0.0, 0.0], 3, [1.0, *[2 / 4] * 4]),  # 4/5, 1/5, ...: 3 * 4 / 8 is capped
        ([0.0, 1.0, 2.0, 3.0, 4.0], 2, [2 / 3, 1 / 3, 0.0, 1 / 3, 2 / 3]),  # 2, 1, 0, 1, 2: 2 d / 6
        ([0.0, 1.0, 2.0, 3.0, 4.0], 3, [1.0, 0.5, 0.0, 0.5, 1.0]),
        ([0.0, 1.0, 2.0, 3.0, 4.0], 4, [1.0, 1.0, 0.0, 1.0, 1.0]),  # the one at the mean only where a place is left
        ([0.0, 1.0, 2.0, 2.0, 3.0, 4.0], 5, [1.0, 1.0, 0.5, 0.5, 1.0, 1.0]),
        ([0.0, 1.0, 2.0, 3.0, 4.0], 5, [1.0] * 5),
        ([0.0, 1.0, 2.0], 9, [1.0] * 3),
        ([19.0, 0.0, -5.0, -5.0, -5.0, -4.0], 3, [1.0, 0.0, *[10 / 19] * 3, 8 / 19]),  # 19, 0, 5, 5, 5, 4
        ([100.0, 12.0, -28.0, -28.0, -28.0, -28.0], 4, [1.0, 3 * 12 / 124, *[3 * 28 / 124] * 4]),
        ([30.0, -20.0, -4.0, -3.0, -3.0], 3, [1.0, 1.0, 0.4, 0.3, 0.3]),  # 1.5 is capped, and then 2 * 20 / 30 is not
        ([0.1, 0.1, 0.1], 2, [2 / 3] * 3),
        ([0.1, None, 0.1, 0.1], 2, [2 / 3, 0.0, 2 / 3, 2 / 3]),
        ([1.0, None, 0.0, 0.0], 2, [1.0, 0.0, 0.5, 0.5]),
        ([None, 0.3], 2, [0.0, 1.0]),
        ([None, None], 2, [0.0, 0.0]),
        ([], 1, []),
    ],
)
def test_spread_inclusion_matches_hand_table(rewards, keep, expected):
    assert spread_inclusion(rewards, keep) == pytest.approx(expected, abs=1e-12)


def test_spread_inclusion_caps_until_nothing_is_above_one():
    # Distances 80, 30 and five of 10, 160 in all: 4 * 80 / 160 is capped, then 3 * 30 / 80 as well; then 2 * 10 / 50.
    rewards = [80.0, -30.0, -10.0, -10.0, -10.0, -10.0, -10.0]
    assert math.fsum(rewards) == 0.0
    assert spread_inclusion(rewards, 4) == pytest.approx([1.0, 1.0, *[0.4] * 5], abs=1e-12)


def test_spread_inclusion_takes_the_rounding_of_the_mean_for_nothing():
    assert sum([0.0, 0.1, 0.2]) / 3 != 0.1
    assert spread_inclusion([0.0, 0.1, 0.2], 1) == pytest.approx([0.5, 0.0, 0.5], abs=1e-12)


@pytest.mark.parametrize("keep", [2, 3, 16, 31, 32, 50])
def test_probabilities_add_up_to_the_places(keep):
    rng = Random(keep)
    for _ in range(50):
        passed = [rng.choice([YES, NO, NO, None]) for _ in range(32)]
        rewards = [None if p is None else rng.choice([p + 0.1 * rng.random(), float(p)]) for p in passed]
        places = min(keep, sum(p is not None for p in passed))
        for pi in (balanced_inclusion(passed, keep), spread_inclusion(rewards, keep)):
            assert math.fsum(pi) == pytest.approx(places, abs=1e-9)
            assert all(0.0 <= p <= 1.0 for p in pi)
            assert all(p == 0.0 for p, judged in zip(pi, passed, strict=True) if judged is None)


@pytest.mark.parametrize("rule", [balanced_inclusion, partial(uniform_inclusion, 4), spread_inclusion])
def test_keep_must_leave_something_of_either_side(rule):
    given = [] if isinstance(rule, partial) else [[1.0, 0.0]]
    with pytest.raises(ValueError, match=r"keep must be >= \d \(got 0\)"):
        rule(*given, 0)
    with pytest.raises(ValueError, match=r"keep must be >= 2 \(got 1\)"):  # one place cannot hold two strata
        balanced_inclusion([YES, NO], 1)


# The draw.


PROBABILITIES = [
    [0.5, 0.5, 0.5, 0.5],
    [0.9, 0.6, 0.3, 0.2],
    [1.0, 0.7, 0.2, 0.1],
    [1.0, 1.0, 0.0, 1.0],
    [0.15, 0.25, 0.35, 0.45, 0.8, 0.0],
    [1 / 3] * 6,
    [0.05, 0.95, 0.99, 0.01],
]


@pytest.mark.parametrize("pi", PROBABILITIES)
def test_systematic_has_the_given_probabilities_and_one_size(pi):
    draws = list(samples(pi))
    assert math.fsum(probability for _, probability in draws) == pytest.approx(1.0, abs=1e-12)
    assert {len(indices) for indices, _ in draws} == {round(sum(pi))}
    assert all(indices == sorted(set(indices)) for indices, _ in draws)
    assert found_inclusion(pi, draws) == pytest.approx(pi, abs=1e-12)


def test_at_start_matches_hand_table():
    # In the order 2, 0, 3, 1 they end at 0.3, 1.2, 1.4, 2.0: points 0.25 and 1.25; 0.35 and 1.35; 0.5 and 1.5.
    pi, order = [0.9, 0.6, 0.3, 0.2], [2, 0, 3, 1]
    assert [at_start(pi, order, start) for start in (0.25, 0.35, 0.5)] == [[2, 3], [0, 3], [0, 1]]


def test_systematic_has_its_probabilities_in_the_mean_of_many_draws():
    # 20,000 draws of 24 of 64: a frequency has a standard error of sqrt(pi (1 - pi) / 20,000) <= 0.0036.
    rng, num_draws = Random(7), 20_000
    pi = spread_inclusion([rng.gauss(0, 1) for _ in range(63)] + [25.0], 24)
    assert pi[63] == 1.0
    draws = [systematic(pi, rng) for _ in range(num_draws)]
    assert {len(indices) for indices in draws} == {24}
    found = found_inclusion(pi, [(indices, 1 / num_draws) for indices in draws])
    errors = [math.sqrt(p * (1 - p) / num_draws) for p in pi]
    assert max(errors) < 0.0036
    assert all(abs(f - p) <= 4.5 * error + 1e-9 for f, p, error in zip(found, pi, errors, strict=True))


def test_strata_with_whole_places_get_them_in_every_draw():
    passed = [YES, NO, NO, YES, YES, NO, NO, YES, None]
    pi = balanced_inclusion(passed, 4)
    assert pi == [0.5] * 8 + [0.0]
    rng, num_draws = Random(1), 20_000
    draws = [systematic(pi, rng, strata=passed) for _ in range(num_draws)]
    assert {sum(passed[i] is True for i in indices) for indices in draws} == {2}
    assert {sum(passed[i] is True for i in systematic(pi, rng)) for _ in range(200)} != {2}
    found = found_inclusion(pi, [(indices, 1 / num_draws) for indices in draws])
    assert max(abs(f - p) for f, p in zip(found, pi, strict=True)) < 4.5 * 0.0036


@pytest.mark.parametrize("num", [3, 7, 49, 512, 4096])
def test_size_holds_where_the_sum_is_an_integer_only_up_to_rounding(num):
    rng = Random(num)
    for keep in (1, 2, num // 3 + 1, num - 1):
        pi = spread_inclusion([rng.random() ** 8 for _ in range(num)], keep)
        assert {len(systematic(pi, rng)) for _ in range(20)} == {keep}


def test_systematic_is_reproducible_and_sorted():
    pi = uniform_inclusion(32, 8)
    assert systematic(pi, Random(3)) == systematic(pi, Random(3)) != systematic(pi, Random(4))
    assert systematic([1.0] * 3, Random(0)) == [0, 1, 2]
    assert systematic([0.0] * 3, Random(0)) == systematic([], Random(0)) == []


@pytest.mark.parametrize(
    ("pi", "strata", "message"),
    [
        ([0.5, 0.6], [], r"pi must add up to an integer, the size of the sample \(got 1.1\)"),
        ([1.5, 0.5], [], r"pi must be from 0 to 1 \(got \[1.5\]\)"),
        ([-0.5, 0.5], [], r"pi must be from 0 to 1 \(got \[-0.5\]\)"),
        ([math.nan, 1.0], [], r"pi must be from 0 to 1 \(got \[nan\]\)"),
        ([0.5, 0.5], [YES], r"strata must name one for each of the 2 pi \(got 1\)"),
    ],
)
def test_systematic_says_what_is_wrong_with_its_input(pi, strata, message):
    with pytest.raises(ValueError, match=message):
        systematic(pi, Random(0), strata=strata)


# The gradient of a softmax over four answers of one token, as in test_estimators.py: rollouts of a group, their
# advantages over all N, and d log p / d logits of each.

P = torch.softmax(torch.tensor([0.5, -0.3, 0.9, 0.1], dtype=torch.float64), 0)
SCORES = torch.eye(4, dtype=torch.float64) - P
REWARDS = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
ADVANTAGES = {"dr_grpo": dr_grpo, "grpo": grpo, "rloo": rloo}

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def terms(answers, advantage):
    """A_i dlog p(y_i) / N of each rollout: they add up to the gradient of all N."""
    return advantage(REWARDS[answers])[:, None] * SCORES[answers] / len(answers)


def inclusion(rule, answers, keep):
    rewards = REWARDS[answers].tolist()
    if rule == "balanced":
        return balanced_inclusion([reward >= 1.0 for reward in rewards], keep)
    return spread_inclusion(rewards, keep) if rule == "spread" else uniform_inclusion(len(rewards), keep)


def weighted(parts, pi, indices):
    return sum(parts[i] / pi[i] for i in indices)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("rule", ["uniform", "balanced", "spread"])
@pytest.mark.parametrize("answers", [[0, 1, 1, 2, 1], [3, 0, 0, 1, 2, 2], [3, 1, 1, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("keep", [2, 3])
def test_weighted_sample_has_the_gradient_of_all_rollouts(answers, rule, advantage, keep):
    answers = torch.tensor(answers)
    parts, pi = terms(answers, ADVANTAGES[advantage]), inclusion(rule, answers, keep)
    close(sum(probability * weighted(parts, pi, indices) for indices, probability in samples(pi)), parts.sum(0))


@pytest.mark.parametrize("rule", ["balanced", "spread"])
def test_without_weights_the_sample_is_biased(rule):
    answers = torch.tensor([3, 0, 1, 1, 1, 1])
    parts, pi = terms(answers, dr_grpo), inclusion(rule, answers, 4)
    mean = sum(probability * parts[indices].sum(0) for indices, probability in samples(pi)) * len(answers) / 4
    assert (mean - parts.sum(0)).norm() / parts.sum(0).norm() > 0.2


def test_spread_is_biased_for_an_advantage_that_is_not_centred_in_the_group():
    # Rewards 2, 1, 0: the one at the mean is never drawn, and has no advantage only if the mean is taken off.
    answers = torch.tensor([3, 0, 1])
    pi = inclusion("spread", answers, 2)
    assert pi == [1.0, 0.0, 1.0]
    parts = terms(answers, lambda rewards: rewards)
    assert (parts[[0, 2]].sum(0) - parts.sum(0)).norm() > 0.1
    close(terms(answers, dr_grpo)[[0, 2]].sum(0), terms(answers, dr_grpo).sum(0))


@pytest.mark.parametrize("rule", ["uniform", "balanced", "spread"])
def test_monte_carlo_mean_of_64_rollouts_agrees_within_its_standard_error(rule):
    # 16 of 64, 20,000 draws: the gradient's components are known to a standard error below 0.001.
    answers = torch.multinomial(P, 64, replacement=True, generator=torch.Generator().manual_seed(5))
    parts, pi, rng = terms(answers, dr_grpo), inclusion(rule, answers, 16), Random(2)
    indices = torch.tensor([systematic(pi, rng) for _ in range(20_000)])
    means = {}
    for name, weight in (("weighted", 1 / torch.tensor(pi)), ("unweighted", torch.full((64,), 64 / 16))):
        draws = (weight.nan_to_num(posinf=0.0)[:, None] * parts)[indices].sum(1)
        error = draws.std(0) / len(draws) ** 0.5
        means[name] = ((draws.mean(0) - parts.sum(0)) / error.clamp_min(1e-12)).abs().max()
        assert error.max() < 0.001
    assert means["weighted"] < 4
    assert means["unweighted"] < 4 if rule == "uniform" else means["unweighted"] > 50


def test_spread_has_the_least_variance_where_gradients_are_of_one_length():
    # A two-answer policy with p = 1/2: every score has the length sqrt(1/2), so pi ~ |A|.
    rewards = [3.0, 1.0, 0.0, -1.0, -1.0, -2.0]
    parts = torch.tensor(rewards, dtype=torch.float64)[:, None] * torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    spread, uniform = spread_inclusion(rewards, 3), uniform_inclusion(6, 3)

    def variance(pi):
        return sum(
            chance * float((weighted(parts, pi, drawn) - parts.sum(0)).square().sum()) for drawn, chance in samples(pi)
        )

    assert sum(rewards) == 0.0
    assert variance(spread) < 0.5 * variance(uniform)
