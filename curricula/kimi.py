"""Easy to hard, then the least solved: curriculum and prioritised sampling of Kimi k1.5, arXiv:2501.12599."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curricula._files import rows_of
from curricula._pool import Pool, require
from rlpost.errors import RunError
from rlpost.types import Task

if TYPE_CHECKING:
    import numpy as np


class Kimi(Pool):
    """The first `warmup_tasks` draws go evenly from the easiest to the hardest; then task i weighs 1 - s_i.

    s_i is the task's success rate so far: the mean of its posterior, so that one never tried counts as its level does.
    How long the warm-up is and how s_i starts are not published. What nobody solves is drawn most: see `learnable`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        difficulty: str | None = None,
        warmup_tasks: int | None = None,
        guesses: str | None = None,
        half_life: float | None = None,
        borrow: float = 2.0,
    ) -> None:
        """`warmup_tasks`: null for a quarter of the tasks where `difficulty` is given, else none.

        `guesses`: a file of `rlpost difficulty RECIPE --n 8 sampling.max_new_tokens=8 ...`, answers without room to
        reason: a task with one pass in it is left out, as the paper does with prompts that are guessed in 8 tries.
        """
        if warmup_tasks is None:
            warmup_tasks = 0 if difficulty is None else len(tasks) // 4
        require("warmup_tasks", warmup_tasks, warmup_tasks >= 0, ">= 0")
        known = difficulty is not None or not warmup_tasks
        require("warmup_tasks", warmup_tasks, known, "0 without curriculum.difficulty, which orders them")
        self.warmup_tasks = warmup_tasks
        self.guessed = guessed_keys(guesses) if guesses is not None else set()
        super().__init__(tasks, seed=seed, difficulty=difficulty, half_life=half_life, borrow=borrow)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None
        if all(task.key in self.guessed for task in self.tasks):
            raise RunError(f"curriculum.guesses must leave tasks (all {len(self.tasks)} are guessed in {guesses})")

    def select(self, n: int) -> list[Task]:
        """The next n of the warm-up, then by weight."""
        early = max(0, min(n, self.warmup_tasks - self.taken))
        chosen = self._easy_to_hard(early) if early else []
        if len(chosen) == n:
            return chosen
        weights = 1 - self.pass_rates()
        weights[self._left_out()] = 0
        return chosen + self.draw(n - early, weights)

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, and how many tasks are left out as guessed."""
        return super().metrics() | {"guessed": float(len(self._left_out()))}

    def _easy_to_hard(self, n: int) -> list[Task]:
        import numpy as np

        made_for = self.seed, len(self.tasks)
        if self._order is None or self._order[0] != made_for:
            ties = np.random.default_rng((self.seed, 0)).random(len(self.tasks))
            known = np.nan_to_num(self.difficulty, nan=float(np.nanmedian(self.difficulty)))
            order = np.lexsort((ties, known))
            self._order = made_for, order[~np.isin(order, self._left_out())]
        order = self._order[1]
        return self.take(order[(self.taken + np.arange(n)) * len(order) // self.warmup_tasks])

    def _left_out(self) -> list[int]:
        return [self.place[key] for key in self.guessed if key in self.place]


def guessed_keys(path: str) -> set[str]:
    """Keys of the tasks with a pass in the file."""
    return {str(row["key"]) for row in rows_of(path, "curriculum.guesses") if row.get("passes", 0) > 0}
