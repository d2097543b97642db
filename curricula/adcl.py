"""Super-batches from easy to hard, each measured again with the current policy before it is entered: arXiv:2505.08364.

delta(x) = 1 - pass rate; all tasks in ascending order, cut into K super-batches B_1 .. B_K; before B_k is entered, the
delta of its tasks is measured again and the batch sorted inside. No task changes its batch. `static: true` leaves this
out: the predefined curriculum (PCL) that ADCL is compared with. Two digests of the paper agree on this; K, rollouts a
measurement and what follows the last batch were not found. Here another round begins with B_1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from curricula._pool import Pool, column_of, counted, packed, require, unpacked
from rlpost.types import Outcome, Task

if TYPE_CHECKING:
    import numpy as np

_COUNTS = ("round", "position", "measured", "last_n", "sorted")
RESOLUTION = 1000
"""Differences in difficulty below a thousandth of its range are ties to `inversion_rate`."""


class Adcl(Pool):
    """Tasks in the order of the super-batches; `wants_measured` asks the loop for answers before one is entered.

    Without `difficulty` the first order is measured too, over all tasks. `draws` limits the round to a random part of
    the tasks, as large as the run will draw, so that a short run gets to the last batch.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        batches: int = 4,
        static: bool = False,
        measure_tries: int | None = None,
        draws: int | None = None,
        difficulty: str | None = None,
    ) -> None:
        """`measure_tries`: answers a task in a measurement; null: as many as in training."""
        size = min(draws or len(tasks), len(tasks))
        require("draws", draws, draws is None or draws >= 1, ">= 1")
        require("batches", batches, 1 <= batches <= size, f"in 1 .. {size}, the number of tasks in a round")
        require("measure_tries", measure_tries, measure_tries is None or measure_tries >= 1, ">= 1")
        self.batches, self.static, self.measure_tries, self.round_size = batches, static, measure_tries, draws
        super().__init__(tasks, seed=seed, difficulty=difficulty)
        self._rewind()

    def wants_measured(self) -> list[Task]:
        """All tasks of the round before the first choice without `difficulty`, and each batch before it is entered."""
        if self.position == len(self.order):
            self._begin_round(measured=0)
        if not self.sorted:
            return [self.tasks[i] for i in self.order]
        start, stop = self._bounds(self.measured)
        if self.static or self.measured == self.batches or self.position + self.last_n <= start:
            return []
        return [self.tasks[i] for i in self.order[start:stop]]

    def select(self, n: int) -> list[Task]:
        """The next n in order; a step may reach into the next batch."""
        if not self.sorted:  # a loop that does not measure
            self._sort_all()
        self.last_n = n
        chosen: list[Task] = []
        while len(chosen) < n:
            if self.position == len(self.order):
                self._begin_round(measured=1)
            part = self.order[self.position : self.position + n - len(chosen)]
            self.position += len(part)
            chosen += self.take(part)
        return chosen

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Take measured difficulties, and sort what was measured."""
        import numpy as np

        super().observe(outcomes)
        measured = [outcome for outcome in outcomes if outcome.measured]
        for outcome in measured:
            passes, tries = counted(outcome)
            if tries:
                self.delta[self.place[outcome.key]] = 1 - passes / tries
        if measured and not self.sorted:
            self._sort_all()
        elif measured:
            batch = slice(*self._bounds(self.measured))
            places = self.order[batch]
            self.inversions = inversion_rate(self.known[places], self.delta[places])
            self.known[places] = self.delta[places]
            self.order[batch] = places[np.argsort(self.delta[places], kind="stable")]
            self.measured += 1

    def add(self, tasks: Sequence[Task]) -> None:
        """Take in further tasks: they belong to the next round."""
        import numpy as np

        super().add(tasks)
        middle = float(np.median(self.delta))
        values = np.array([_known(task, self._difficulty, middle) for task in tasks])
        self.delta, self.known = np.append(self.delta, values), np.append(self.known, values)

    def estimate(self) -> np.ndarray:
        """The newest measurement of each task."""
        return self.delta

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, the super-batch, the round, and the normalised inversion rate of the last re-estimation."""
        batch = sum(self._bounds(i)[1] <= self.position for i in range(self.batches))
        own = {"super_batch": float(min(batch, self.batches - 1)), "round": float(self.round)}
        shift = {} if math.isnan(self.inversions) else {"inversion_rate": self.inversions}
        return super().metrics() | own | shift

    def state_dict(self) -> dict[str, Any]:
        """As `Pool`, and the order with what it was made of."""
        arrays = {"delta": self.delta, "known": self.known, "order": self.order.astype("<i4")}
        own = {name: getattr(self, name) for name in _COUNTS} | {name: packed(x) for name, x in arrays.items()}
        return super().state_dict() | own | {"inversions": None if math.isnan(self.inversions) else self.inversions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._rewind()  # as long as before anything was added, which `Pool` adds again
        super().load_state_dict(state)
        self.delta, self.known = unpacked(state["delta"], "<f8"), unpacked(state["known"], "<f8")
        self.order = unpacked(state["order"], "<i4")
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.inversions = math.nan if state["inversions"] is None else state["inversions"]

    def _rewind(self) -> None:
        import numpy as np

        size = len(self._base)
        self.round, self.position, self.measured, self.last_n, self.inversions = 0, 0, 1, 0, math.nan
        self.delta = np.full(size, 0.5) if self._difficulty is None else self.difficulty[:size].copy()
        self.delta[np.isnan(self.delta)] = np.nanmedian(self.delta)
        self.known = self.delta.copy()
        self.order = self._part()
        self.sorted = False
        if self._difficulty is not None:
            self._sort_all()

    def _part(self) -> np.ndarray:
        """The tasks of a round, in random order."""
        import numpy as np

        whole = np.random.default_rng((self.seed, 0, self.round)).permutation(len(self.delta))
        return whole[: self.round_size].astype(np.int32)

    def _begin_round(self, measured: int) -> None:
        """Begin again with the easiest; where a step reached over the end, the first batch is not measured."""
        self.round, self.position, self.measured = self.round + 1, 0, measured
        self.order = self._part()
        self._sort_all()

    def _sort_all(self) -> None:
        import numpy as np

        self.order = self.order[np.argsort(self.delta[self.order], kind="stable")]
        self.known[:] = self.delta
        self.sorted = True

    def _bounds(self, batch: int) -> tuple[int, int]:
        """Where a super-batch stands in the order."""
        return len(self.order) * batch // self.batches, len(self.order) * (batch + 1) // self.batches


def inversion_rate(before: np.ndarray, after: np.ndarray) -> float:
    """Share of pairs whose order has turned round: #inversions / (n (n - 1) / 2); a tie on either side is none.

    >>> import numpy as np
    >>> inversion_rate(np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.0, 1.0]))   # one of three pairs
    0.3333333333333333
    """
    import numpy as np

    if len(before) < 2:
        return 0.0
    rank = [np.unique(_coarse(values), return_inverse=True)[1] for values in (before, after)]
    table = np.zeros((rank[0].max() + 1, rank[1].max() + 1), dtype=np.int64)
    np.add.at(table, tuple(rank), 1)
    later = table[::-1].cumsum(0)[::-1] - table  # those with a larger `before`
    lower = later.cumsum(1) - later  # of these, with a smaller `after`
    return float((table * lower).sum() / (len(before) * (len(before) - 1) / 2))


def _known(task: Task, difficulty: str | None, otherwise: float) -> float:
    value = column_of(task, difficulty)
    return otherwise if math.isnan(value) else value


def _coarse(values: np.ndarray) -> np.ndarray:
    import numpy as np

    width = float(values.max() - values.min())
    return np.round((values - values.min()) * (RESOLUTION / width)) if width else np.zeros_like(values)
