"""Reward for word problems with a number as the answer, such as GSM8K."""

from __future__ import annotations

import re

from rewards._numbers import NUMBER, as_number
from rlpost.types import Rollout

MARKER = re.compile(r"####|answer is", re.IGNORECASE)
UNDER, OVER = re.compile(r"(?:\s+\d+)?\s*/\s*\d"), re.compile(r"\d\s*/\s*$")
"""What stands behind a number that is the upper part of a fraction, or before one that is the lower."""
NEAR = 20
"""Characters in which a fraction is looked for."""


def final_number(rollout: Rollout) -> float:
    """1 where the final number equals the answer exactly, else 0; a right number elsewhere in the text counts nothing.

    The final number is the first one after the last `####` or "answer is", behind the last `=` of that line where it
    has one, and without a marker the last one of the text. A fraction is no number: `25/16` is neither 25 nor 16.
    """
    wanted = as_number(rollout.task.answer or "")
    if wanted is None:
        raise ValueError(
            f"final_number needs tasks with a number as the answer (got {rollout.task.answer!r} in {rollout.task.key})"
        )
    found = final_number_text(rollout.text)
    return float(found is not None and as_number(found) == wanted)


def final_number_text(text: str) -> str | None:
    """The final number as it was written.

    >>> final_number_text("6 * 12 = $72. The answer is: $72.")
    '$72'
    """
    start = 0
    if markers := list(MARKER.finditer(text)):
        start = markers[-1].end()
        line, _, _ = text[start:].partition("\n")
        last, equals, result = line.rpartition("=")
        start += len(last + equals) if NUMBER.search(result) else 0
    numbers = list(NUMBER.finditer(text, start))
    if not numbers:
        return None
    found = numbers[0] if markers else numbers[-1]
    before, after = text[max(0, found.start() - NEAR) : found.start()], text[found.end() : found.end() + NEAR]
    return None if OVER.search(before) or UNDER.match(after) else found.group().strip()
