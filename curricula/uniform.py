"""Every task equally often: epochs without replacement, each in its own order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from rlpost.errors import RunError
from rlpost.types import Outcome, Task


class Uniform:
    """Tasks in an order that depends on the seed and the epoch only."""

    def __init__(self, tasks: Sequence[Task], *, seed: int) -> None:
        self.tasks = list(tasks)
        self.seed = seed
        self.taken = 0
        self._fingerprint = hashlib.sha1("\n".join(task.key for task in self.tasks).encode()).hexdigest()
        self._order = self._order_of(epoch=0)

    def select(self, n: int) -> list[Task]:
        """The next n tasks; a new epoch starts where one ends."""
        chosen = []
        for _ in range(n):
            position = self.taken % len(self.tasks)
            if position == 0:
                self._order = self._order_of(self.taken // len(self.tasks))
            chosen.append(self.tasks[self._order[position]])
            self.taken += 1
        return chosen

    def observe(self, outcomes: list[Outcome]) -> None:
        """Nothing is learned from outcomes."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `select` depends on, apart from the tasks."""
        return {"taken": self.taken, "seed": self.seed, "tasks": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the tasks must be the same."""
        if state["tasks"] != self._fingerprint:
            raise RunError(
                "tasks.train must be what the checkpoint was trained on (its keys differ, in number or in order): give "
                "the same tasks, or start a new run"
            )
        self.seed, self.taken = state["seed"], state["taken"]
        self._order = self._order_of(self.taken // len(self.tasks))

    def metrics(self) -> dict[str, float]:
        """`epoch`: passes over the tasks so far."""
        return {"epoch": self.taken / len(self.tasks)}

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order
