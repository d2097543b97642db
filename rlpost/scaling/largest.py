"""The largest size of model, predicted from runs of the smaller ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpost.errors import RunError
from rlpost.scaling.bootstrap import stretch_of
from rlpost.scaling.fit import Estimate, Fit
from rlpost.scaling.fits import fit_power, mean_of, power_points, slopes
from rlpost.scaling.laws import Array
from rlpost.scaling.points import Points
from rlpost.scaling.runs import RunCurve


@dataclass(frozen=True)
class SizePrediction:
    """What the law says of the largest size, beside what its runs did."""

    size: float
    fit: Fit
    """On the smaller sizes."""
    k: Estimate
    """k(N) by the law."""
    k_seen: Estimate
    """The mean of the runs' own slopes."""
    loss: Estimate
    """log10 L at the end, mean over the runs: slope by the law, constant from the first part of each run."""
    loss_seen: Estimate
    same_slope: float
    """log10 L at the end with the slope of the largest of the smaller sizes instead: what a law of N must beat."""

    @property
    def error(self) -> float:
        """Predicted less measured log10 L at the end."""
        return self.loss.value - self.loss_seen.value


def predict_largest(
    runs: Sequence[RunCurve], x: str = "compute", *, num: int = 500, seed: int = 0, share: float = 0.5
) -> SizePrediction:
    """Fit the smaller sizes; the largest size's constant E, of which the law is silent, is read off its start."""
    largest = max(run.size for run in runs)
    small, large = [run for run in runs if run.size < largest], [run for run in runs if run.size == largest]
    if len({run.size for run in small}) < 2:
        raise RunError(f"to predict the largest size there must be two smaller ones (got {len(small)} smaller runs)")
    law, points = fit_power(small, x, num=num, seed=seed), power_points(large, x)
    k, k_S = slope_at(law, largest)
    low, high = law.replicates.interval(k_S, k)
    start_R, ahead_R, end_R = _ways(points, share)
    left = end_R - (start_R - k * ahead_R)
    value = float((start_R - k * ahead_R).mean())
    scatter = float(np.std(left, ddof=1) / math.sqrt(len(left))) if len(left) > 1 else law.noise
    rng = np.random.default_rng(seed)
    drawn_S = value - (k_S - k) * ahead_R.mean() * law.replicates.stretch(k_S)
    drawn_S = drawn_S + rng.standard_normal(num) * scatter * stretch_of(max(1, len(left) - 1))
    tails = np.quantile(drawn_S, [0.025, 0.975])
    end = float(end_R.mean())
    before = slopes(power_points(small, x))[-1][2].value
    return SizePrediction(
        size=largest,
        fit=law,
        k=Estimate("k", k, low, high, "1"),
        k_seen=slopes(points)[0][2],
        loss=Estimate("log10 L", value, float(tails[0]), float(tails[1]), "1"),
        loss_seen=mean_of(list(end_R), "log10 L", "1") or Estimate("log10 L", end, end, end, "1"),
        same_slope=float((start_R - before * ahead_R).mean()),
    )


def slope_at(found: Fit, size: float) -> tuple[float, Array]:
    """k(N) at the estimate and at each replicate."""
    one = np.array([[size, 1.0]])
    return -float(found.law.predict(found.theta, one)[0]), -found.law.predict(found.replicates.theta_Sp, one)[:, 0]


def _ways(points: Points, share: float) -> tuple[Array, Array, Array]:
    """For each run: the mean of its first points, how far its end is from there in log10 X, and its end."""
    first = points.take(points.first(share))
    ends = np.searchsorted(points.run_n, np.arange(points.num_runs), side="right") - 1
    ahead = points.x_nc[ends, 1] - first.run_means(first.x_nc[:, 1])
    return first.run_means(first.y_n), ahead, points.y_n[ends]
