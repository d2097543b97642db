"""Points that a law is fitted to: several runs one after the other, each with its points in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlpost.scaling.laws import Array


@dataclass(frozen=True)
class Points:
    """`n` points of some runs; runs of one stratum differ by their seed alone.

    >>> points = Points(np.array([[1.0], [2.0], [1.0]]), np.array([3.0, 5.0, 7.0]), np.array([0, 0, 1]), ("a", "a"))
    >>> points.num_runs, points.centred(points.y_n).tolist()
    (2, [-1.0, 1.0, 0.0])
    """

    x_nc: Array
    y_n: Array
    run_n: NDArray[np.int64]
    """Number of the run, 0, 1, ..., without a gap and in this order."""
    strata: tuple[str, ...]
    """Of each run."""
    names: tuple[str, ...] = field(default=())
    """Of each run."""

    def __len__(self) -> int:
        return len(self.y_n)

    @property
    def num_runs(self) -> int:
        """How many runs there are."""
        return len(self.strata)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each run begins."""
        return np.searchsorted(self.run_n, np.arange(self.num_runs))

    def run_means(self, value: Array) -> Array:
        """The mean over each run, `[..., n]` to `[..., runs]`."""
        counts = np.bincount(self.run_n, minlength=self.num_runs)
        return np.add.reduceat(value, self.starts, axis=-1) / counts

    def centred(self, value: Array) -> Array:
        """`value` less its mean over each run."""
        return value - self.run_means(value)[..., self.run_n]

    def take(self, chosen_n: NDArray[np.bool_]) -> Points:
        """Only these points; a run that has none of them is gone."""
        kept = np.unique(self.run_n[chosen_n])
        names = tuple(self.names[i] for i in kept) if self.names else ()
        renumbered = np.searchsorted(kept, self.run_n[chosen_n])
        return Points(self.x_nc[chosen_n], self.y_n[chosen_n], renumbered, tuple(self.strata[i] for i in kept), names)

    def first(self, share: float) -> NDArray[np.bool_]:
        """Whether a point is in the first `share` of its run's points."""
        starts = self.starts
        counts = np.diff([*starts, len(self)])
        place_n = np.arange(len(self)) - starts[self.run_n]
        return place_n < np.ceil(share * counts)[self.run_n]
