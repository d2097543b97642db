"""Reward for multiple choice: one letter, and only one."""

from __future__ import annotations

import re

from rewards._answers import clean
from rewards._found import boxed, marked
from rlpost.types import Rollout, Score

_CHOICE = re.compile(r"(?:option|choice|letter)?\s*\(?\[?([A-Za-z])\]?\)?(?:$|[.:)]|\s+[-:]|(?<=\))\s)", re.IGNORECASE)
_OTHERS = re.compile(r"(?<![A-Za-z])(?:or|and|/|,|&)\s*\(?\[?[A-Z]\]?\)?(?![A-Za-z])")


def choice_letter(rollout: Rollout, *, choices: str = "ABCDE") -> Score:
    r"""1 where the final answer names the right letter and no second one, else 0.

    The final answer is what the last `\boxed{...}` holds, else what follows the last "answer is" or `####`, else the
    whole text where it is a letter alone. `A`, `(A)`, `A.` and `A: seven` all name A; `A or B` names none.
    """
    wanted = letter_of(rollout.task.answer or "", choices)
    if wanted is None:
        raise ValueError(
            f"choice_letter needs tasks with a letter of {choices} as the answer (got {rollout.task.answer!r} in "
            f"{rollout.task.key})"
        )
    text = boxed(rollout.text)
    if text is None and r"\boxed" not in rollout.text:
        text = marked(rollout.text) or (rollout.text if len(rollout.text.strip()) < 4 else None)
    found = None if text is None else letter_of(text, choices)
    if found is None:
        return Score(0.0, unparsable=True, note="no one letter")
    return Score(float(found == wanted), note=found)


def letter_of(text: str, choices: str) -> str | None:
    """The one letter that an answer names.

    >>> [letter_of(text, "ABCD") for text in ("(B)", "b", "C. seven", "A or B", "All", "E")]
    ['B', 'B', 'C', None, None, None]
    """
    text = clean(text)
    found = _CHOICE.match(text)
    if found is None or _OTHERS.search(text, found.end(1)):
        return None
    letter = found.group(1).upper()
    return letter if letter in choices else None
