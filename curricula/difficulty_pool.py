"""Easy, normal and hard tasks by their pass rate so far, in fixed shares: the pools of prime-rl's curriculum."""

from __future__ import annotations

from collections.abc import Sequence

from curricula._pool import Pool, require, smallest
from rlpost.types import Task


class DifficultyPool(Pool):
    """A task is easy above `easy`, hard below `hard`, else normal, by the mean of its posterior.

    Each pool gives its share of a step, the least often drawn first; what a pool lacks, the others give. With a
    `half_life` tasks come back from the outer pools, as what is known of them fades.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        easy: float = 0.8,
        hard: float = 0.2,
        easy_share: float = 0.1,
        hard_share: float = 0.2,
        difficulty: str | None = None,
        half_life: float | None = 30.0,
        borrow: float = 2.0,
    ) -> None:
        require("hard", f"hard {hard} and easy {easy}", 0 <= hard < easy <= 1, "below curriculum.easy, both in [0, 1]")
        shares = easy_share + hard_share
        require("easy_share", easy_share, min(easy_share, hard_share) >= 0 and shares <= 1, ">= 0, 1 with hard_share")
        self.easy, self.hard, self.easy_share, self.hard_share = easy, hard, easy_share, hard_share
        self._sizes = (0, 0, 0)
        super().__init__(tasks, seed=seed, difficulty=difficulty, half_life=half_life, borrow=borrow)

    def select(self, n: int) -> list[Task]:
        """Draw from each pool as much as its share is, and the rest from whatever was drawn least."""
        import numpy as np

        rates = self.pass_rates()
        pools = [np.flatnonzero(rates > self.easy), np.flatnonzero(rates < self.hard)]
        inside = (rates <= self.easy) & (rates >= self.hard)
        self._sizes = (len(pools[0]), int(inside.sum()), len(pools[1]))
        often = self.drawn + self.dice().random(len(rates), dtype=np.float32)
        wanted = [round(n * self.easy_share), round(n * self.hard_share)]
        parts = [pool[smallest(often[pool], k)] for pool, k in zip(pools, wanted, strict=True) if k and len(pool)]
        normal = np.flatnonzero(inside)
        left = n - sum(map(len, parts))
        parts += [normal[smallest(often[normal], left)]] if left > 0 and len(normal) else []
        chosen = np.concatenate(parts)[:n] if parts else np.zeros(0, dtype=np.int64)
        often[chosen] += len(self.tasks) + float(self.drawn.max())
        while len(chosen) < n:
            chosen = np.concatenate([chosen, smallest(often, n - len(chosen))])
        return self.take(self.dice().permutation(chosen))

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, and how many tasks the pools had in the last choice."""
        names = ("pool_easy", "pool_normal", "pool_hard")
        return super().metrics() | {name: float(x) for name, x in zip(names, self._sizes, strict=True)}
