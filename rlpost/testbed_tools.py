"""Sums that a small model cannot do in its head, with demonstrations that call a calculator now and then.

`48+92-15=` is answered `[48+92]140;[140-15]125;#125` with the calculator, which writes what follows each `]`, and
`48+92=140;140-15=125;#125` without. A demonstration chooses anew for each step; one in the head is wrong with
probability `error_rate`, and the chain goes on from the wrong value.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from rlpost.errors import RunError
from rlpost.testbed import below, digest

ALPHABET = "0123456789+-=;#[]?"
"""Every character of a problem and its solution; `?` is what the calculator says to what is no arithmetic."""
_TRIES = 2000


def called_sums(
    *,
    split: str,
    size: int,
    min_terms: int,
    max_terms: int,
    call_rate: float = 0.5,
    error_rate: float = 0.5,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Up to `size` different sums of two-digit terms; no partial sum is negative.

    A problem's hash decides whether it belongs to `train` or to `eval` (a tenth), whatever the other arguments are.

    >>> row = next(called_sums(split="train", size=1, min_terms=3, max_terms=3, call_rate=1.0))
    >>> row["prompt"].count("+") + row["prompt"].count("-"), row["solution"].count("["), row["terms"]
    (2, 2, 3)
    """
    if split not in ("train", "eval") or not 2 <= min_terms <= max_terms:
        raise RunError(
            f"called_sums: split must be `train` or `eval`, and 2 <= min_terms <= max_terms must hold (got {split!r}, "
            f"{min_terms} and {max_terms})"
        )
    rng = random.Random(seed)
    seen: set[str] = set()
    for _ in range(size):
        for _ in range(_TRIES):
            terms = _terms(rng, min_terms + below(rng, max_terms - min_terms + 1))
            prompt = "".join([str(terms[0]), *(f"{term:+d}" for term in terms[1:])]) + "="
            if prompt not in seen and (digest(prompt) % 10 == 0) == (split == "eval"):
                break
        else:
            return
        seen.add(prompt)
        solution = demonstration(terms, random.Random(digest(f"{seed} {prompt}")), call_rate, error_rate)
        yield {"prompt": prompt, "answer": str(sum(terms)), "solution": solution, "terms": len(terms)}


def demonstration(terms: list[int], rng: random.Random, call_rate: float, error_rate: float) -> str:
    """A chain of steps, with the calculator or in the head.

    >>> demonstration([48, 92, -15], random.Random(0), call_rate=1.0, error_rate=0.0)
    '[48+92]140;[140-15]125;#125'
    """
    total, steps = terms[0], []
    for term in terms[1:]:
        step, result = f"{total}{term:+d}", total + term
        if rng.random() < call_rate:
            steps.append(f"[{step}]{result};")
        else:
            if rng.random() < error_rate:
                result = max(0, result + (1 + below(rng, 9)) * (1 if below(rng, 2) else -1))
            steps.append(f"{step}={result};")
        total = result
    return f"{''.join(steps)}#{total}"


def _terms(rng: random.Random, number: int) -> list[int]:
    terms = [10 + below(rng, 90)]
    while len(terms) < number:
        term = 10 + below(rng, 90)
        terms.append(-term if term <= sum(terms) and below(rng, 2) else term)
    return terms
