"""Every task equally often: epochs without replacement, each in its own order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from curricula._pool import check_fingerprint, check_new, fingerprint, task_of
from rlpost.types import Outcome, Task


class Uniform:
    """Tasks in an order that depends on the seed and the epoch only; what is added joins with the next epoch."""

    def __init__(self, tasks: Sequence[Task], *, seed: int) -> None:
        self.tasks = list(tasks)
        self.added: list[Task] = []
        self.seed = seed
        self.epoch, self.position = 0, 0
        self._fingerprint = fingerprint(self.tasks)
        self._order = self._order_of(self.epoch, len(self.tasks))

    def select(self, n: int) -> list[Task]:
        """The next n tasks; a new epoch starts where one ends."""
        chosen = []
        for _ in range(n):
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch, len(self.tasks))
            chosen.append(self.tasks[self._order[self.position]])
            self.position += 1
        return chosen

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing is learned from outcomes."""

    def add(self, tasks: Sequence[Task]) -> None:
        """Take in further tasks; they are part of the state, as the recipe does not have them."""
        check_new(tasks, {task.key for task in self.tasks})
        self.tasks += tasks
        self.added += tasks

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `select` depends on, apart from the tasks of the recipe."""
        return {
            "tasks": self._fingerprint,
            "added": [asdict(task) for task in self.added],
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "size": len(self._order),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the tasks must be the same."""
        check_fingerprint(state["tasks"], self._fingerprint)
        base = self.tasks[: len(self.tasks) - len(self.added)]
        self.added = [task_of(row) for row in state["added"]]
        self.tasks = base + self.added
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._order_of(self.epoch, state["size"])

    def metrics(self) -> dict[str, float]:
        """`epoch`: passes over the tasks so far."""
        return {"epoch": self.epoch + self.position / len(self._order)}

    def _order_of(self, epoch: int, size: int) -> list[int]:
        order = list(range(size))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order
