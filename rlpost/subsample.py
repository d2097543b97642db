"""Train on m of a group's N rollouts, with the gradient of all N: inclusion probabilities, and a draw that has them.

All N rollouts give the rewards, so each has its advantage before any is left out; then

    pi = spread_inclusion(rewards, keep=m)                # how likely each rollout is to be trained; adds up to m
    trained = systematic(pi, rng)                         # exactly m of them
    gradient = sum(A[i] * g[i] / pi[i] for i in trained) / N

has the expectation `sum(A_i g_i) / N` over draws wherever `A_i g_i != 0` implies `pi_i > 0` (Horvitz and Thompson,
1952). The weight of a trained rollout is `1 / pi`, and the divisor stays that of all N. Without the weights, rollouts
that are kept more often than others pull the gradient to their side.

A rollout that could not be judged (None) is never trained: its advantage is 0, so its `pi` of 0 costs nothing. Where
no more than `keep` rollouts are judged, all of these have 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import accumulate
from random import Random

ROUNDING = 1e-9
"""Probabilities, sums of them and relative deviations are told apart down to this."""


def uniform_inclusion(num: int, keep: int) -> list[float]:
    """Every rollout alike, `pi_i = m / N`.

    >>> uniform_inclusion(4, keep=2)
    [0.5, 0.5, 0.5, 0.5]
    """
    _check_keep(keep, at_least=1)
    return [min(keep / num, 1.0)] * num if num else []


def balanced_inclusion(passed: Sequence[bool | None], keep: int) -> list[float]:
    """As many successes as failures, as far as there are; uniform among either. Needs `keep >= 2`.

    Of m places, k successes get `s = min(k, m - min(N - k, m // 2))` and the N - k failures the rest: pi is s / k and
    (m - s) / (N - k). Where k <= m / 2 all successes are trained, and the same for failures; no place stays empty.
    Every judged rollout has pi > 0, so the gradient is unbiased for any advantage.

    >>> balanced_inclusion([True, False, False, False, False, None], keep=3)
    [1.0, 0.5, 0.5, 0.5, 0.5, 0.0]
    """
    _check_keep(keep, at_least=2)
    num_successes, num_failures = sum(p is True for p in passed), sum(p is False for p in passed)
    places = min(keep, num_successes + num_failures)
    successes = min(num_successes, places - min(num_failures, places // 2))
    share = {
        True: successes / max(num_successes, 1),
        False: (places - successes) / max(num_failures, 1),
        None: 0.0,
    }
    return [share[p] for p in passed]


def spread_inclusion(rewards: Sequence[float | None], keep: int) -> list[float]:
    """In proportion to the distance from the mean, `pi_i ~ |r_i - mean(r)|`, at most 1.

    Of all pi that add up to m, `pi_i ~ |A_i g_i|` makes `sum(|A_i g_i|^2 / pi_i)` least, on which the variance of the
    sampled gradient depends: this is it for gradients `g_i` of one length and an advantage that is a multiple of
    r - mean(r). It trains what is far from the mean, as max-variance down-sampling (arXiv:2504.13818) does, but without
    its bias. What would be above 1 is set to 1 and the places left are shared out anew, until nothing is.

    A rollout at the mean has pi = 0 unless the others leave places over, which those at the mean share. Its advantage
    is 0 where the group's mean is the baseline. An advantage that is not centred in the group (reward alone, greedy or
    length-weighted baseline, whitened without a group mean) is not 0 there: for it this rule is biased. Where all
    rewards are equal it is uniform.

    >>> spread_inclusion([1.0, 0.0, 0.0, 0.0, 0.0], keep=3)      # distances 4 and 1: 12 / 8 is capped
    [1.0, 0.5, 0.5, 0.5, 0.5]
    """
    _check_keep(keep, at_least=1)
    judged = [reward for reward in rewards if reward is not None]
    places = min(keep, len(judged))
    mean = math.fsum(judged) / max(len(judged), 1)
    distances = [0.0 if reward is None else abs(reward - mean) for reward in rewards]
    largest = max(distances, default=0.0)
    if not judged or min(judged) == max(judged):
        return [0.0 if reward is None else places / len(judged) for reward in rewards]
    # The float mean of 0, 0.1 and 0.2 is not quite 0.1.
    distances = [distance if distance > ROUNDING * largest else 0.0 for distance in distances]
    far = [i for i, distance in enumerate(distances) if distance]
    if len(far) > places:
        return _in_proportion(distances, places)
    near = len(judged) - len(far)
    rest = (places - len(far)) / near if near else 0.0
    return [0.0 if reward is None else 1.0 if distances[i] else rest for i, reward in enumerate(rewards)]


def systematic(pi: Sequence[float], rng: Random, *, strata: Sequence[Hashable] = ()) -> list[int]:
    """Sorted indices of a random sample of exactly `sum(pi)` rollouts, rollout i with probability `pi[i]`.

    Systematic sampling of a random order, Madow (1949). Rollouts of one of the `strata` (a name for each rollout) stand
    together in the order: a stratum whose pi add up to an integer has just as many in every sample. So
    `strata=passed` makes the shares of `balanced_inclusion` exact, which otherwise hold in the mean.

    >>> systematic([1.0, 0.5, 0.5, 0.0], Random(0)) in ([0, 1], [0, 2])
    True
    """
    _check_inclusion(pi, strata)
    order = list(range(len(pi)))
    rng.shuffle(order)
    if strata:
        first = {strata[i]: place for place, i in reversed(list(enumerate(order)))}
        order.sort(key=lambda i: first[strata[i]])
    return at_start(pi, order, rng.random())


def at_start(pi: Sequence[float], order: Sequence[int], start: float) -> list[int]:
    """The systematic sample of one order and one start in [0, 1).

    Laid end to end in this order, rollout i covers a length of pi[i]; taken are those that cover a point of start,
    start + 1, start + 2, ... None covers two, as certain ones are set aside and the others are shorter than 1.

    >>> at_start([0.5, 0.5, 0.5, 0.5], order=[0, 1, 2, 3], start=0.7)
    [1, 3]
    """
    certain = [i for i in order if pi[i] >= 1 - ROUNDING]
    others = [i for i in order if pi[i] < 1 - ROUNDING]
    ends = [_snapped(end) for end in accumulate(pi[i] for i in others)]
    passed = [0, *(math.ceil(end - start) for end in ends)]
    drawn = [i for i, before, after in zip(others, passed, passed[1:], strict=False) if after > before]
    return sorted(certain + drawn)


def _in_proportion(sizes: Sequence[float], places: int) -> list[float]:
    """`pi ~ size` with sum `places`, at most 1; more than `places` sizes are above 0."""
    certain: set[int] = set()
    while True:
        total = math.fsum(size for i, size in enumerate(sizes) if i not in certain)
        left = places - len(certain)
        above = {i for i, size in enumerate(sizes) if i not in certain and left * size >= total}
        if not above:
            return [1.0 if i in certain else left * size / total for i, size in enumerate(sizes)]
        certain |= above


def _snapped(value: float) -> float:
    """The integer beside a value that only rounding keeps from it."""
    return float(round(value)) if abs(value - round(value)) < ROUNDING else value


def _check_keep(keep: int, *, at_least: int) -> None:
    if keep < at_least:
        raise ValueError(f"keep must be >= {at_least} (got {keep})")


def _check_inclusion(pi: Sequence[float], strata: Sequence[Hashable]) -> None:
    if not all(0.0 <= p <= 1.0 + ROUNDING for p in pi):  # False for NaN as well
        raise ValueError(f"pi must be from 0 to 1 (got {[p for p in pi if not 0.0 <= p <= 1.0 + ROUNDING]})")
    total = math.fsum(pi)
    if abs(total - round(total)) > ROUNDING * max(len(pi), 1):
        raise ValueError(f"pi must add up to an integer, the size of the sample (got {total})")
    if strata and len(strata) != len(pi):
        raise ValueError(f"strata must name one for each of the {len(pi)} pi (got {len(strata)})")
