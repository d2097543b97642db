"""Rules for the solutions of a problem."""

from __future__ import annotations

from rlpost.synth.filters.rules import is_stuck
from rlpost.synth.rows import Row, consensus, normal


def solution_rules(row: Row, *, repeated: int = 20, leak_chars: int = 4) -> str | None:
    """Why a problem goes, or None: no solution ends with an answer, all are stuck, or the answer stands in the problem.

    `leak_chars`: a shorter answer may stand in the problem by chance.
    """
    solutions = row["solutions"]
    if all(one["finish"] == "too_long" for one in solutions):
        return "problem too long for the teacher"
    if all(one["finish"] != "stop" for one in solutions):
        return "solution cut off"
    if all(one["answer"] is None for one in solutions):
        return "no final answer"
    if all(is_stuck(one["text"], repeated) or is_stuck(one["reasoning"], repeated) for one in solutions):
        return "repetition"
    answer = consensus(solutions)[0]
    if answer is not None and len(normal(answer)) >= leak_chars and normal(answer) in row["prompt"]:
        return "answer in the problem"
    return None
