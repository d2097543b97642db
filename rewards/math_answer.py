r"""Reward for mathematics: the final answer is the reference, in whatever form either is written."""

from __future__ import annotations

from functools import partial

from rewards._answers import equal
from rewards._found import boxed, marked
from rlpost.types import Rollout, Score

NEEDS = ("rewards._symbolic",)
ON_HANG = "drop"


def math_answer(rollout: Rollout, *, where: str = "any", symbolic: bool = True) -> Score:
    r"""1 where the last `\boxed{...}`, or what follows the last "answer is" or `####`, equals the answer; else 0.

    `where`: `any`, or `boxed` to accept a box alone. `symbolic`: compare by `math_verify` what is no number, word or
    list. Nothing else in the text counts, however often the right answer stands there.
    """
    if rollout.task.answer is None:
        raise ValueError(f"math_answer needs tasks with an answer (task {rollout.task.key} has none)")
    if where not in ("any", "boxed"):
        raise ValueError(f"math_answer.where must be any or boxed (got {where!r})")
    found = boxed(rollout.text)
    if found is None and where == "any" and r"\boxed" not in rollout.text:
        found = marked(rollout.text)
    if found is None:
        return Score(0.0, unparsable=True, note="no final answer")
    return Score(float(equal(found, rollout.task.answer, same_expression if symbolic else None)), note=found[:80])


def same_expression(a: str, b: str) -> bool:
    """Loads `math_verify` where it is needed, and not before."""
    from rewards import _symbolic

    return partial(_symbolic.same_expression, a, b)()
