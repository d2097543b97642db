"""Random pruning and a window that slides over clusters of difficulty: SeTa, arXiv:2503.13385.

The paper clusters samples by their loss; here by 1 - pass rate. Its loss of a sample never seen is large, here it is
that of the level. What it claims (half the cost without loss) is for supervised training, and was not verified here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from curricula._pool import Pool, packed, require, unpacked
from rlpost.types import Task

if TYPE_CHECKING:
    import numpy as np


class Seta(Pool):
    """An epoch: a random share of 1 - `ratio` of the tasks, of which the groups in the window are trained on once.

    epoch 0:            every group
    epoch e:            groups s .. s + w - 1 from easy to hard,  w = round(G window),  s = e mod (G - w + 1)
    the last 1 - delta: no window (annealing)
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        epochs: int = 8,
        ratio: float = 0.1,
        groups: int = 5,
        window: float = 0.6,
        delta: float = 0.875,
        difficulty: str | None = None,
        half_life: float | None = None,
        borrow: float = 2.0,
    ) -> None:
        """`epochs`: of the whole run, each of at most (1 - ratio) of the tasks; annealing goes on after the last."""
        require("epochs", epochs, epochs >= 1, ">= 1")
        require("ratio", ratio, 0 <= ratio < 1, "in [0, 1)")
        require("groups", groups, groups >= 1, ">= 1")
        require("window", window, 0 < window <= 1, "in (0, 1]")
        require("delta", delta, 0 <= delta <= 1, "in [0, 1]")
        self.epochs, self.ratio, self.groups, self.window, self.delta = epochs, ratio, groups, window, delta
        super().__init__(tasks, seed=seed, difficulty=difficulty, half_life=half_life, borrow=borrow)
        self._rewind()

    def select(self, n: int) -> list[Task]:
        """The next n tasks; a new epoch starts where one ends."""
        chosen: list[Task] = []
        while len(chosen) < n:
            if self.position == len(self.queue):
                self.epoch, self.position = self.epoch + 1, 0
                self.queue = self._queue_of(self.epoch)
            part = self.queue[self.position : self.position + n - len(chosen)]
            self.position += len(part)
            chosen += self.take(part)
        return chosen

    @property
    def annealing(self) -> bool:
        """Whether the window is off for the rest of the run."""
        return self.epoch >= self.delta * self.epochs

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, the epoch, its tasks, and whether it anneals."""
        own = {"epoch": float(max(0, self.epoch)), "epoch_tasks": float(len(self.queue))}
        return super().metrics() | own | {"annealing": float(self.annealing)}

    def state_dict(self) -> dict[str, Any]:
        """As `Pool`, and the tasks of the epoch."""
        own = {"epoch": self.epoch, "position": self.position, "queue": packed(self.queue.astype("<i4"))}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state)
        self.epoch, self.position, self.queue = state["epoch"], state["position"], unpacked(state["queue"], "<i4")

    def _rewind(self) -> None:
        import numpy as np

        self.epoch, self.position, self.queue = -1, 0, np.zeros(0, dtype=np.int32)

    def _queue_of(self, epoch: int) -> np.ndarray:
        size = max(1, round((1 - self.ratio) * len(self.tasks)))
        kept = self.dice().permutation(len(self.tasks))[:size]
        if epoch == 0 or self.annealing:
            return kept
        group = clusters(1 - self.pass_rates(kept), self.groups)
        found = int(group.max()) + 1
        width = max(1, round(found * self.window))
        start = epoch % (found - width + 1)
        return kept[(group >= start) & (group < start + width)]


def clusters(values: np.ndarray, groups: int, *, rounds: int = 100) -> np.ndarray:
    """k-means in one dimension: which group each value is in, from the least; fewer groups where values are few.

    Lloyd's algorithm on sorted values, started at quantiles.

    >>> import numpy as np
    >>> clusters(np.array([0.9, 0.1, 0.12, 0.5, 0.88]), 3).tolist()
    [2, 0, 0, 1, 2]
    """
    import numpy as np

    ordered = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = np.unique(np.quantile(ordered, (np.arange(groups) + 0.5) / groups))
    for _ in range(rounds):
        cuts = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], cuts, [len(ordered)]])
        size = np.diff(ends)
        moved = np.unique((np.diff(sums[ends]) / np.maximum(size, 1))[size > 0])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, values, side="right")
