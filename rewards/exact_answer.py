"""Reward for answers that have one spelling."""

from __future__ import annotations

from rlpost.types import Rollout


def exact_answer(rollout: Rollout, *, after: str = "", casefold: bool = False) -> float:
    """1 where the text is the answer, apart from white space at its ends; else 0.

    `after`: only what follows the last of these words counts, such as `####`; without them the reward is 0.
    """
    if rollout.task.answer is None:
        raise ValueError(f"exact_answer needs tasks with an answer (task {rollout.task.key} has none)")
    _, found, said = rollout.text.rpartition(after) if after else ("", "all", rollout.text)
    said, wanted = said.strip(), rollout.task.answer.strip()
    if casefold:
        said, wanted = said.casefold(), wanted.casefold()
    return float(bool(found) and said == wanted)
