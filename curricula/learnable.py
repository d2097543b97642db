"""Tasks that the policy sometimes solves: sampling by the expected signal of a group under a Beta posterior.

The gradient of a group vanishes where all its answers score the same; for pass rate p its size goes with p (1 - p),
which is also the bound on what one prompt can gain (AdaRFT, arXiv:2504.05520; not verified here). The posterior, its
fading and the correction are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from curricula._pool import Pool, drawn, require
from rlpost.types import Task

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 15
"""Tasks whose weights are worked out at once, so that they stay in the cache."""


class Learnable(Pool):
    """Weight E[p (1 - p)], or with `weight: mixed` the probability that a group of `group_size` has both outcomes.

    w = (1 - floor) s^power / sum(s^power) + floor / N
    s = E[p (1 - p)] or 1 - E[p^G] - E[(1 - p)^G],   p ~ Beta of `Pool`
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        weight: Literal["variance", "mixed"] = "variance",
        group_size: int = 8,
        power: float = 1.0,
        floor: float = 0.1,
        half_life: float | None = 30.0,
        borrow: float = 2.0,
        difficulty: str | None = None,
        correct: bool = False,
    ) -> None:
        """`correct`: weigh what is trained by 1 / (N w), so that the gradient is that of uniform sampling."""
        require("weight", weight, weight in ("variance", "mixed"), "variance or mixed")
        require("group_size", group_size, group_size >= 2, ">= 2")
        require("power", power, power > 0, "> 0")
        require("floor", floor, 0 <= floor <= 1, "in [0, 1]")
        require("floor", floor, floor > 0 or not correct, "> 0 with curriculum.correct, which divides by it")
        self.weight, self.group_size, self.power, self.floor, self.correct = weight, group_size, power, floor, correct
        self.factor: dict[str, float] = {}
        super().__init__(tasks, seed=seed, difficulty=difficulty, half_life=half_life, borrow=borrow)

    def select(self, n: int) -> list[Task]:
        """Draw n tasks by their weight, none twice."""
        weights = self.weights()
        places = drawn(n, weights, self.dice())
        if self.correct:
            if self._reported:  # else a later wave of the same step
                self.factor = {}
            factors = 1 / (len(self.tasks) * weights[places])
            self.factor |= {self.tasks[i].key: float(x) for i, x in zip(places, factors, strict=True)}
        return self.take(places)

    def correction(self, key: str) -> float:
        """What a task chosen in this step counts, so that on average all tasks count the same; 1 unless asked for.

        With replacement 1 / (N w) would be exact; without, as here, it is as good as n max(w) is small.
        """
        return self.factor.get(key, 1.0)

    def weights(self) -> np.ndarray:
        """Probability of each task to be the next one, float32."""
        import numpy as np

        a, b = self.beta()
        signal = expected_variance(a, b) if self.weight == "variance" else np.empty_like(a)
        if self.weight == "mixed":
            for start in range(0, len(a), BLOCK):
                block = slice(start, start + BLOCK)
                signal[block] = mixed_probability(a[block], b[block], self.group_size)
        if self.power != 1:
            signal **= np.float32(self.power)
        whole = float(signal.sum(dtype=np.float64))
        if whole <= 0:
            return np.full(len(a), 1 / len(a), dtype=np.float32)
        signal *= np.float32((1 - self.floor) / whole)
        signal += np.float32(self.floor / len(a))
        return signal

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, and with `correct` the effective share of the step: (sum f)^2 / (n sum f^2)."""
        said = super().metrics()
        factors = list(self.factor.values())
        if factors:
            said["correction_ess"] = math.fsum(factors) ** 2 / (len(factors) * math.fsum(x * x for x in factors))
        return said


def expected_variance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """E[p (1 - p)] = a b / ((a + b) (a + b + 1)) for p ~ Beta(a, b).

    >>> import numpy as np
    >>> expected_variance(np.array([1.0]), np.array([1.0])).round(4).tolist()
    [0.1667]
    """
    whole = a + b
    return a * b / (whole * (whole + 1))


def mixed_probability(a: np.ndarray, b: np.ndarray, group_size: int) -> np.ndarray:
    """1 - E[p^G] - E[(1 - p)^G] for p ~ Beta(a, b);  E[p^G] = prod over j < G of (a + j) / (a + b + j).

    >>> import numpy as np
    >>> mixed_probability(np.array([1.0]), np.array([1.0]), 2).round(4).tolist()   # 1 - 1/3 - 1/3
    [0.3333]
    """
    import numpy as np

    every, none, whole = np.ones_like(a), np.ones_like(a), a + b
    for j in range(group_size):
        every *= (a + j) / (whole + j)
        none *= (b + j) / (whole + j)
    return np.maximum(1 - every - none, 0)
