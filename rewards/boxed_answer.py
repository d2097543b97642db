r"""Reward for answers in `\boxed{...}`, as mathematics models give them."""

from __future__ import annotations

from rewards._numbers import as_number
from rlpost.types import Rollout

OPEN = r"\boxed{"


def boxed_answer(rollout: Rollout, *, strip: str = "$ ") -> float:
    r"""1 where the last `\boxed{...}` holds the answer, as text or as the same number, else 0.

    `strip`: characters without meaning at the ends of both.
    """
    if rollout.task.answer is None:
        raise ValueError(f"boxed_answer needs tasks with an answer (task {rollout.task.key} has none)")
    found, wanted = last_box(rollout.text).strip().strip(strip), rollout.task.answer.strip().strip(strip)
    if not found:
        return 0.0
    number = as_number(found)
    return float(found == wanted or (number is not None and number == as_number(wanted)))


def last_box(text: str) -> str:
    r"""What the last `\boxed{` holds, up to its own closing brace; empty where there is none, or it stays open.

    >>> last_box(r"\boxed{1}, so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = text.rfind(OPEN)
    if start < 0:
        return ""
    start += len(OPEN)
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return ""
