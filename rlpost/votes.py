"""maj@k: how often the answer that most of k samples give is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from rlpost.errors import RecipeError, RunError
from rlpost.plugins import resolve
from rlpost.types import Rollout

VOTES = 64
"""The largest k below n for which maj@k is worked out: its cost grows with k^2."""


def voter(asked: str | None, reward: str) -> Callable[[Rollout], Hashable] | None:
    """What gives a rollout's answer: `evaluation.vote`, else that of the first reward; None where it has none."""
    shipped = {"final_number": number_of, "boxed_answer": boxed_of}
    if asked is None or asked in shipped:
        return shipped.get(asked or reward)
    try:
        return resolve(asked, "rewards")
    except RunError as error:
        raise RecipeError([f"evaluation.vote: {error}"]) from None


def number_of(rollout: Rollout) -> Hashable:
    """The final number, as `rewards/final_number.py` reads it; 72 and 72.0 are one answer."""
    from rewards._numbers import as_number
    from rewards.final_number import final_number_text

    text = final_number_text(rollout.text)
    return None if text is None else as_number(text)


def boxed_of(rollout: Rollout) -> Hashable:
    r"""What the last `\boxed{...}` holds, a number by its value and anything else as text."""
    from rewards._numbers import as_number
    from rewards.boxed_answer import last_box

    text = last_box(rollout.text).strip().strip("$ ")
    number = as_number(text)
    return (text or None) if number is None else number


def majority_at_k(votes: Sequence[Sequence[int]], n: int, k: int) -> float:
    """Expected correctness of the most frequent answer among k of the n samples, over all C(n, k) choices.

    `votes` are the [count, right] of each answer; samples beyond them gave none and do not vote. Where several answers
    are most frequent, one of them is taken at random. With no vote at all it is wrong. The sum over choices is exact:

    sum over right answers a, j votes for a, t others with j votes too, of C(m_a, j) W_a(k - j, t) / (t + 1) / C(n, k)

    where W_a(v, t) counts the ways to draw v votes from the others, none with more than j, t of them with j.
    Self-consistency, arXiv:2203.11171.

    >>> round(majority_at_k([[2, 1], [1, 0]], n=4, k=2), 4)      # rr 1, rw 1/2 (2 ways), r- 1 (2), w- 0 of 6
    0.6667
    >>> majority_at_k([[2, 1], [2, 0]], n=4, k=4)
    0.5
    """
    if k == n:
        return _plurality(votes)
    silent = n - sum(count for count, _ in votes)
    ways = 0.0
    for place, (count, right) in enumerate(votes):
        others = [other for i, (other, _) in enumerate(votes) if i != place]
        if right:
            ways += math.fsum(
                math.comb(count, j) * _shared(others, silent, k - j, j) for j in range(1, min(count, k) + 1)
            )
    return ways / math.comb(n, k)


def _plurality(votes: Sequence[Sequence[int]]) -> float:
    most = max((count for count, _ in votes), default=0)
    first = [right for count, right in votes if count == most]
    return sum(first) / len(first) if first else 0.0


def _shared(others: Sequence[int], silent: int, rest: int, top: int) -> float:
    """Ways to draw `rest` samples from the others with at most `top` votes each, each over 1 + how many have `top`."""
    import numpy as np

    ties = rest // top
    ways = np.zeros((rest + 1, ties + 1))
    ways[0, 0] = 1.0
    for count in others:
        drawn = ways.copy()
        for v in range(1, min(count, top - 1, rest) + 1):
            drawn[v:] += math.comb(count, v) * ways[:-v]
        if top <= min(count, rest):
            drawn[top:, 1:] += math.comb(count, top) * ways[:-top, :-1]
        ways = drawn
    blank = np.array([float(math.comb(silent, rest - v)) for v in range(rest + 1)])
    return float((blank @ ways) @ (1.0 / np.arange(1, ties + 2)))
