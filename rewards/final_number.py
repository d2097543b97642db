"""Reward for word problems with a number as the answer, such as GSM8K."""

from __future__ import annotations

import re

from rewards._numbers import NUMBER, as_number
from rlpost.types import Rollout

MARKER = re.compile(r"####|answer is", re.IGNORECASE)


def final_number(rollout: Rollout) -> float:
    """1 where the final number equals the answer exactly, else 0; a right number elsewhere in the text counts nothing.

    The final number is the first one after the last `####` or "answer is", and without these the last one of the text.
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
    markers = list(MARKER.finditer(text))
    numbers = [found.group().strip() for found in NUMBER.finditer(text, markers[-1].end() if markers else 0)]
    if not numbers:
        return None
    return numbers[0] if markers else numbers[-1]
