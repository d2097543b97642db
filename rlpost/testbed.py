"""Sums of one-digit terms with a worked chain: problems without a hub, exactly verifiable, with a dial for difficulty.

`7-0+6-3=` is answered `7-0=7;7+6=13;13-3=10;#10`. Difficulty is the number of terms. Demonstrations may be imperfect,
as a pretraining corpus is: a step is wrong with probability `error_rate`, and the chain goes on from the wrong value.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from typing import Any

from rlpost.errors import RunError
from rlpost.types import Rollout

ALPHABET = "0123456789+-=;#"
"""Every character of a problem and its solution."""

_PROBLEM = re.compile(r"\d([+-]\d)+=")
_TRIES = 2000
"""Draws without a new problem after which a level counts as used up."""


def chain_sums(
    *,
    split: str,
    size: int,
    min_terms: int,
    max_terms: int,
    max_total: int = 20,
    error_rate: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Up to `size` different problems, levels drawn uniformly; a level without new problems is skipped.

    A problem's hash decides whether it belongs to `train` or to `eval` (a tenth), whatever the other arguments are.

    >>> row = next(chain_sums(split="train", size=1, min_terms=4, max_terms=4))
    >>> row["terms"], row["solution"] == correct_chain(row["prompt"])
    (4, True)
    """
    _check(split, min_terms, max_terms, max_total, error_rate)
    rng = random.Random(seed)
    levels = list(range(min_terms, max_terms + 1))
    seen: set[str] = set()
    while levels and len(seen) < size:
        level = levels[below(rng, len(levels))]
        prompt = _new_problem(rng, level, max_total, split, seen)
        if prompt is None:
            levels.remove(level)
            continue
        seen.add(prompt)
        solution = _demonstration(prompt, error_rate, seed)
        yield {"prompt": prompt, "answer": correct_answer(prompt), "solution": solution, "terms": level}


def sums_with_hints(
    *,
    split: str,
    size: int,
    min_terms: int,
    max_terms: int,
    hinted_terms: list[int],
    hinted_frac: float = 0.5,
    max_total: int = 20,
    error_rate: float = 0.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Plain problems, and among them longer ones whose prompt begins with first steps of the solution and a `#`.

    A base model that learns from these can read a hint, and has never seen a long problem without one. The lengths of
    hinted problems are the range `hinted_terms`, and how many steps are shown is drawn anew for each.

    >>> rows = sums_with_hints(split="train", size=2, min_terms=2, max_terms=3, hinted_terms=[6, 6], hinted_frac=1.0)
    >>> row = next(rows)
    >>> hint, _, problem = row["prompt"].rpartition("#")
    >>> row["solution"].startswith(hint), row["solution"] == correct_chain(problem), row["terms"]
    (True, True, 6)
    """
    if not 0 <= hinted_frac <= 1:
        raise RunError(f"sums_with_hints: hinted_frac must be in [0, 1] (got {hinted_frac})")
    shared: dict[str, Any] = {"split": split, "max_total": max_total, "error_rate": error_rate, "seed": seed}
    plain = chain_sums(size=size, min_terms=min_terms, max_terms=max_terms, **shared)
    hinted = chain_sums(size=size, min_terms=hinted_terms[0], max_terms=hinted_terms[1], **shared)
    rng = random.Random(f"{seed} hints")
    for _ in range(size):
        if rng.random() >= hinted_frac:
            row = next(plain, None)
        elif (row := next(hinted, None)) is not None:
            steps = row["solution"].split(";")[:-1]
            shown = "".join(f"{step};" for step in steps[: 1 + below(rng, len(steps))])
            row = {**row, "prompt": f"{shown}#{row['prompt']}"}
        if row is None:
            return
        yield row


def correct_chain(prompt: str) -> str:
    """The one right solution.

    >>> correct_chain("7-0+6-3=")
    '7-0=7;7+6=13;13-3=10;#10'
    """
    return _demonstration(prompt, error_rate=0.0, seed=0)


def correct_answer(prompt: str) -> str:
    """The sum.

    >>> correct_answer("7-0+6-3=")
    '10'
    """
    return str(sum(_terms(prompt)))


def same_chain(rollout: Rollout) -> float:
    """A reward: 1 where the text is the task's answer, which is a whole chain that somebody says is right."""
    return float(rollout.text == rollout.task.answer)


def _terms(prompt: str) -> list[int]:
    if not _PROBLEM.fullmatch(prompt):
        raise ValueError(f"a chain sum must look like `7-0+6-3=` (got {prompt!r})")
    return [int(term) for term in re.findall(r"[+-]?\d", prompt)]


def _demonstration(prompt: str, error_rate: float, seed: int) -> str:
    rng = random.Random(digest(f"{seed} {prompt}"))
    first, *rest = _terms(prompt)
    total, steps = first, []
    for sign, term in zip(re.findall(r"[+-]", prompt), rest, strict=True):
        result = total + term
        if rng.random() < error_rate:
            error = 1 + below(rng, 3)
            result = max(0, result + error if below(rng, 2) else result - error)
        steps.append(f"{total}{sign}{abs(term)}={result};")
        total = result
    return f"{''.join(steps)}#{total}"


def _new_problem(rng: random.Random, level: int, max_total: int, split: str, seen: set[str]) -> str | None:
    for _ in range(_TRIES):
        prompt = _draw(rng, level, max_total)
        held_out = digest(prompt) % 10 == 0
        if held_out == (split == "eval") and prompt not in seen:
            return prompt
    return None


def _draw(rng: random.Random, level: int, max_total: int) -> str:
    """One problem; signs are even, and every partial sum stays in 0..max_total."""
    total = below(rng, min(9, max_total) + 1)
    text = str(total)
    for _ in range(level - 1):
        plus = bool(below(rng, 2))
        term = below(rng, min(9, max_total - total if plus else total) + 1)
        total += term if plus else -term
        text += f"{'+' if plus else '-'}{term}"
    return f"{text}="


def below(rng: random.Random, n: int) -> int:
    """0..n-1 from `random()`, the one method whose sequence Python keeps between versions."""
    return int(rng.random() * n)


def digest(text: str) -> int:
    """A number that follows from a text alone.

    >>> digest("7-0+6-3=") % 10
    3
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _check(split: str, min_terms: int, max_terms: int, max_total: int, error_rate: float) -> None:
    if split not in ("train", "eval"):
        raise RunError(f"chain_sums: split must be `train` or `eval` (got {split!r})")
    if not 2 <= min_terms <= max_terms:
        raise RunError(f"chain_sums: 2 <= min_terms <= max_terms must hold (got {min_terms} and {max_terms})")
    if max_total < 1:
        raise RunError(f"chain_sums: max_total must be >= 1 (got {max_total})")
    if not 0 <= error_rate < 1:
        raise RunError(f"chain_sums: error_rate must be in [0, 1) (got {error_rate})")
