"""The work that benchmarks give to trainers: texts of known length, a reward that any model can learn, TRL's job."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rlpost.types import Rollout

SMALL, LARGE = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT_TOKENS = 24
"""Mean length of a short text."""
LONG_FRAC = 0.06
"""Share of long texts among mixed ones."""


@dataclass(frozen=True)
class Job:
    """One comparison, as TRL gets it."""

    model: str
    dtype: str
    prompts: list[str]
    chat: bool
    """Whether prompts go through the chat template."""
    prompts_per_step: int
    group_size: int
    max_new_tokens: int
    lr: float
    steps: int
    rows: int
    """Rollouts in one forward pass of its training."""
    generator: Literal["dynamic", "static", "continuous_batching"] = "dynamic"
    """Of transformers: by its key-value cache."""
    seed: int = 0


def letters(
    *, kind: Literal["long", "mixed", "both"], size: int, long_tokens: int, prompt_tokens: int = 8, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Prompts, and random texts that follow them.

    A `long` prompt begins with l; what follows has `long_tokens` letters. A `mixed` one begins with m; a few texts are
    long and the others short, their length geometric. What is long is in capitals, so that a small model learns it.

    >>> row = next(letters(kind="long", size=1, long_tokens=5))
    >>> row["prompt"][0], len(row["prompt"]), len(row["solution"]), row["solution"].isupper()
    ('l', 8, 5, True)
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < size:
        first = {"long": "l", "mixed": "m"}.get(kind) or rng.choice("lmmmm")
        prompt = first + "".join(rng.choices(SMALL, k=prompt_tokens - 2)) + "="
        if prompt in seen:
            continue
        seen.add(prompt)
        if first == "l" or rng.random() < LONG_FRAC:
            yield {"prompt": prompt, "solution": "".join(rng.choices(LARGE, k=long_tokens))}
        else:
            length = 1 + int(rng.expovariate(1 / (SHORT_TOKENS - 1)))
            yield {"prompt": prompt, "solution": "".join(rng.choices(SMALL, k=length))}


def pens(*, kind: Literal["story", "question"], size: int) -> Iterator[dict[str, Any]]:
    """Prompts for an instruction model: plain text that it continues for long, or questions with a short answer.

    >>> next(pens(kind="question", size=1))["prompt"]
    'What is 3 plus 4? Answer with the number only.'
    """
    for i in range(size):
        a, b = 3 + i, 4 + 2 * i
        story = f"Once there was a town with {a} shops and {b} houses, and this is what happened there in winter:"
        yield {"prompt": story if kind == "story" else f"What is {a} plus {b}? Answer with the number only."}


def vowels(rollout: Rollout) -> float:
    """The reward: how much of a text is vowels."""
    return share_of_vowels(rollout.text)


def coin(rollout: Rollout) -> float:
    """A reward that says nothing: heads or tails by what was written, the same for the same answer."""
    return float(hashlib.sha256(f"{rollout.group} {rollout.token_ids}".encode()).digest()[0] % 2)


def share_of_vowels(text: str) -> float:
    """How much of a text is vowels; it can be learned whatever the length of answers.

    >>> share_of_vowels("ArEa"), share_of_vowels("")
    (0.75, 0.0)
    """
    return sum(letter in "aeiouAEIOU" for letter in text) / max(len(text), 1)
