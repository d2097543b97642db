"""Uniform, but what the policy has learnt leaves: No-Positive-Resampling of ScaleRL, arXiv:2510.13786."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from curricula.uniform import Uniform
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

log = logging.getLogger(__name__)


class Scalerl(Uniform):
    """A task leaves for good once the share of its rollouts that passed, over all steps, reaches `threshold`.

    Where too few are left for a step, it is filled up with those that have left and were solved least.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, threshold: float = 0.9) -> None:
        if not 0 < threshold <= 1:
            raise RunError(f"curriculum.threshold must be in (0, 1] (got {threshold})")
        super().__init__(tasks, seed=seed)
        self.threshold = threshold
        self.passed: dict[str, int] = {}
        self.judged: dict[str, int] = {}
        self.retired: dict[str, None] = {}
        """Keys, in the order in which they left."""
        self._told = False

    def select(self, n: int) -> list[Task]:
        """The next n tasks that have not left; a new epoch starts where one ends."""
        out = self._out(n)
        chosen: list[Task] = []
        while len(chosen) < n:
            chosen += [task for task in super().select(n - len(chosen)) if task.key not in out]
        return chosen

    def observe(self, outcomes: list[Outcome]) -> None:
        """Count passes, and let tasks leave; a rollout that could not be judged does not count."""
        for outcome in outcomes:
            judged = [passed for passed in outcome.passed if passed is not None]
            if not judged:
                continue
            self.passed[outcome.key] = self.passed.get(outcome.key, 0) + sum(judged)
            self.judged[outcome.key] = self.judged.get(outcome.key, 0) + len(judged)
            if self._pass_rate(outcome.key) >= self.threshold:
                self.retired[outcome.key] = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `select` depends on, apart from the tasks."""
        history = {"passed": dict(self.passed), "judged": dict(self.judged), "retired": list(self.retired)}
        return super().state_dict() | history

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the tasks must be the same."""
        super().load_state_dict(state)
        self.passed, self.judged = dict(state["passed"]), dict(state["judged"])
        self.retired = dict.fromkeys(state["retired"])

    def metrics(self) -> dict[str, float]:
        """`epoch`: passes over the tasks, those that have left included; `retired` and `left`: numbers of tasks."""
        retired = len(self.retired)
        return super().metrics() | {"retired": float(retired), "left": float(len(self.tasks) - retired)}

    def _out(self, n: int) -> set[str]:
        """Who is not to be drawn, such that at least n tasks, or all, can be."""
        missing = min(n, len(self.tasks)) - (len(self.tasks) - len(self.retired))
        if missing <= 0:
            return set(self.retired)
        if not self._told:
            self._told = True
            log.warning(
                "curriculum: %d of %d tasks are solved, fewer than the %d of a step are left: it is filled up with the "
                "least solved of the others; give more tasks, or raise curriculum.threshold",
                len(self.retired),
                len(self.tasks),
                n,
            )
        return set(sorted(self.retired, key=self._pass_rate)[missing:])

    def _pass_rate(self, key: str) -> float:
        return self.passed[key] / self.judged[key]
