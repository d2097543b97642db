"""Tasks near a target difficulty that follows the reward: AdaRFT, arXiv:2504.05520, algorithm 1.

T <- clip(T + eta tanh(alpha (R - target)), 0, 1),   R: share of passes in the step

Difficulties are scaled to 0..1 (the paper: 0..100, so that its eta of 50 is 0.5 here). The paper takes the tasks
nearest to T, which may be the same ones step after step; here a task rests after it was drawn, and ties are broken at
random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from curricula._pool import Pool, counted, require, smallest
from rlpost.types import Outcome, Task

if TYPE_CHECKING:
    import numpy as np


class Adarft(Pool):
    """The n tasks nearest to the target difficulty, of those that have not been drawn lately.

    The paper's R is the mean reward after the KL penalty; here it is the share that passed. Where a step has several
    waves, T moves once for all of them together. A task of unknown difficulty counts as the median.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        difficulty: str,
        target: float = 0.5,
        alpha: float = 2.0,
        eta: float = 0.5,
        start: float = 0.0,
        rest: float = 0.5,
        jitter: float = 0.02,
    ) -> None:
        """`rest`: a task may come again once so large a share of all tasks was drawn after it."""
        require("target", target, 0 < target < 1, "in (0, 1)")
        require("alpha", alpha, alpha > 0, "> 0")
        require("eta", eta, eta > 0, "> 0")
        require("start", start, 0 <= start <= 1, "in [0, 1]")
        require("rest", rest, 0 <= rest <= 1, "in [0, 1]")
        require("jitter", jitter, jitter >= 0, ">= 0")
        self.target, self.alpha, self.eta, self.rest, self.jitter = target, alpha, eta, rest, jitter
        self.aim = self.aim_before = start
        """T, and what it was before the newest step."""
        self.of_step = [-1, 0, 0]
        """The newest step with its passes and tries."""
        super().__init__(tasks, seed=seed, difficulty=difficulty)
        self._low, self._high, self._middle = _spread(self.difficulty)

    def select(self, n: int) -> list[Task]:
        """The nearest to the target; where too few are rested, those that rested longest."""
        import numpy as np

        distance = np.abs(self.positions() - self.aim) + self.jitter * self.dice().random(len(self.tasks))
        resting = (self.drawn > 0) & (self.drawn_at >= self.taken - self.rest * len(self.tasks))
        distance[resting] = 2 + self.jitter + self.drawn_at[resting] / max(1, self.taken)
        nearest = smallest(distance, n)
        return self.take(np.resize(nearest, n))

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Move the target by the passes of the step; what was only measured does not move it."""
        super().observe(outcomes)
        for outcome in outcomes:
            if outcome.measured:
                continue
            if outcome.step > self.of_step[0]:
                self.aim_before, self.of_step = self.aim, [outcome.step, 0, 0]
            passes, tries = counted(outcome)
            self.of_step = [self.of_step[0], self.of_step[1] + passes, self.of_step[2] + tries]
        _, passes, tries = self.of_step
        if tries:
            move = self.eta * math.tanh(self.alpha * (passes / tries - self.target))
            self.aim = min(1.0, max(0.0, self.aim_before + move))

    def positions(self) -> np.ndarray:
        """Difficulty of each task, 0 for the easiest and 1 for the hardest."""
        import numpy as np

        scaled = np.clip((self.difficulty - self._low) / (self._high - self._low), 0, 1)
        return np.where(np.isnan(scaled), self._middle, scaled)

    def estimate(self) -> np.ndarray:
        """The difficulties that were given."""
        return self.positions()

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, and `aim`: the target difficulty, from 0 to 1."""
        return super().metrics() | {"aim": self.aim}

    def state_dict(self) -> dict[str, Any]:
        """As `Pool`, and the target with what it was moved by."""
        return super().state_dict() | {"aim": [self.aim, self.aim_before], "of_step": list(self.of_step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state)
        self.aim, self.aim_before = state["aim"]
        self.of_step = list(state["of_step"])


def _spread(difficulty: np.ndarray) -> tuple[float, float, float]:
    """Least and largest difficulty, and where the median stands between them."""
    import numpy as np

    low, high = float(np.nanmin(difficulty)), float(np.nanmax(difficulty))
    require("difficulty", f"{low:g} for every task", high > low, "of at least two values")
    return low, high, float((np.nanmedian(difficulty) - low) / (high - low))
