"""Stages by step: each trains on the tasks of a range of difficulty, as prescribed before the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curricula._pool import Pool, require
from rlpost.errors import RunError
from rlpost.plugins import did_you_mean
from rlpost.types import Outcome, Task

if TYPE_CHECKING:
    import numpy as np

KEYS = ("steps", "at_least", "at_most")


class Staged(Pool):
    """`stages: [{steps: 20, at_most: 4}, {steps: 20, at_least: 4, at_most: 6}, {}]`; the last one has no end.

    Within a stage the least often drawn tasks come first, in random order. A task of unknown difficulty is in the
    stages without bounds only. A later wave of a step may already belong to the next stage.
    """

    def __init__(
        self, tasks: Sequence[Task], *, seed: int, difficulty: str, stages: Sequence[Mapping[str, float]]
    ) -> None:
        self.stages = [_stage(stage, i, len(stages)) for i, stage in enumerate(stages)]
        require("stages", list(stages), bool(stages), "a list of at least one stage")
        self.next_step = 0
        super().__init__(tasks, seed=seed, difficulty=difficulty)
        for i, stage in enumerate(self.stages):
            if not len(self.members(stage)):
                known = self.difficulty[self.difficulty == self.difficulty]
                raise RunError(
                    f"curriculum.stages.{i} must have tasks (none is in {dict(stages[i])}; difficulties are from "
                    f"{known.min():g} to {known.max():g})"
                )

    @property
    def stage(self) -> int:
        """Which stage the next step belongs to."""
        end = 0.0
        for i, stage in enumerate(self.stages[:-1]):
            end += stage["steps"]
            if self.next_step < end:
                return i
        return len(self.stages) - 1

    def select(self, n: int) -> list[Task]:
        """Draw n tasks of the stage."""
        return self.in_rounds(n, self.members(self.stages[self.stage]))

    def members(self, stage: Mapping[str, float]) -> np.ndarray:
        """Places of the tasks of a stage."""
        import numpy as np

        inside = np.ones(len(self.tasks), dtype=bool)
        if "at_least" in stage:
            inside &= self.difficulty >= stage["at_least"]
        if "at_most" in stage:
            inside &= self.difficulty <= stage["at_most"]
        return np.flatnonzero(inside)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Count steps, and passes for the figures."""
        super().observe(outcomes)
        self.next_step = max([self.next_step, *(outcome.step + 1 for outcome in outcomes)])

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, and the stage of the next step, from 0."""
        return super().metrics() | {"stage": float(self.stage)}

    def state_dict(self) -> dict[str, Any]:
        """As `Pool`, and the next step."""
        return super().state_dict() | {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state)
        self.next_step = state["next_step"]


def _stage(stage: Mapping[str, float], i: int, stages: int) -> dict[str, float]:
    """One stage, checked."""
    where = f"curriculum.stages.{i}"
    if not isinstance(stage, Mapping):
        raise RunError(f"{where} must be a mapping such as {{steps: 20, at_most: 4}} (got {stage!r})")
    for key, value in stage.items():
        if key not in KEYS:
            raise RunError(f"{where}.{key}: no such key{did_you_mean(key, KEYS)} (it takes {', '.join(KEYS)})")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RunError(f"{where}.{key} must be a number (got {value!r})")
    if i + 1 < stages and stage.get("steps", 0) < 1:
        raise RunError(f"{where}.steps must be >= 1 for every stage but the last (got {stage.get('steps')})")
    return dict(stage)
