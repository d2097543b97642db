"""Intervals from resampled data, in the way in which the data came to be.

- `runs`: whole runs are drawn anew inside each stratum (runs that differ by their seed). What points of a run share,
  such as its base model and its order of prompts, stays together. Used where every stratum has two runs or more, with
  several points each.
- `residuals`: the points keep their place; what the law left over is drawn anew. Where neighbours in a run are alike,
  as an autoregression of order one. Of a single run it cannot know how another seed would differ.

Quantiles of few draws are too narrow. Both are stretched about the estimate by t / z, Student's against the normal
quantile at the degrees of freedom, and `runs` by sqrt(m / (m - 1)) as well, m runs a stratum: arXiv:1411.5279, which
does it by the level of the percentile.

Shapes: `S` replicates, `n` points, `p` parameters, `R` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t

from rlpost.scaling.laws import Array, Law
from rlpost.scaling.points import Points
from rlpost.scaling.search import fit_many, residuals

Method = Literal["runs", "residuals"]


@dataclass(frozen=True)
class Replicates:
    """Parameters of resampled data, and how far to stretch their spread."""

    theta_Sp: Array
    offset_SR: Array
    """The constant of each run, where the law has one, else 0."""
    df: int
    """Degrees of freedom of residuals; of runs, every interval has its own."""
    weight_SR: Array | None = None
    """How often each run was drawn, where runs were."""
    strata: tuple[str, ...] = ()
    """Of each run."""
    correlation: float = 0.0
    """Of neighbouring residuals in a run; 0 where they were taken as independent."""

    @property
    def method(self) -> Method:
        """What was drawn."""
        return "residuals" if self.weight_SR is None else "runs"

    def interval(self, value_S: Array, at: float, level: float = 0.95) -> tuple[float, float]:
        """Quantiles of a function of the parameters, about its value `at` the estimate."""
        tails = np.quantile(value_S, [(1 - level) / 2, (1 + level) / 2])
        low, high = at + self.stretch(value_S) * (tails - at)
        return float(min(low, at)), float(max(high, at))

    def stretch(self, value_S: Array) -> float:
        """What the spread of a figure over the replicates is to be multiplied by.

        The variance of each stratum, v_s = sum over its runs of cov(value, times drawn)^2, has m_s - 1 degrees of
        freedom and is (m_s - 1) / m_s of what it should be; together they have (sum v_s)^2 / sum(v_s^2 / (m_s - 1)),
        after Satterthwaite.
        """
        if self.weight_SR is None:
            return stretch_of(self.df)
        part_R = ((value_S - value_S.mean()) @ (self.weight_SR - self.weight_SR.mean(0)) / len(value_S)) ** 2
        names = np.array(self.strata)
        parts = [(part_R[names == name].sum(), int((names == name).sum()) - 1) for name in dict.fromkeys(self.strata)]
        whole = sum(v for v, _ in parts)
        if not whole > 0:
            return stretch_of(self.df)
        df = whole**2 / sum(v**2 / free for v, free in parts)
        return stretch_of(df) * float(np.sqrt(sum(v * (free + 1) / free for v, free in parts) / whole))


def replicate(law: Law, points: Points, theta: Array, *, num: int, seed: int) -> Replicates:
    """Fit `num` resampled data sets."""
    rng = np.random.default_rng(seed)
    sizes = np.array([points.strata.count(stratum) for stratum in dict.fromkeys(points.strata)])
    start = np.tile(theta, (num, 1))
    if sizes.min() >= 2 and len(points) > points.num_runs:
        weight = _run_weights(points, num, rng)
        target = np.broadcast_to(points.y_n, (num, len(points)))
        found = fit_many(law, points, target, start, weight_Sn=weight[:, points.run_n])
        df = int((sizes - 1).sum())
        return Replicates(found, offsets(law, points, found, target), df, weight, points.strata)
    target, df, correlation = _new_targets(law, points, theta, num, rng)
    found = fit_many(law, points, target, start)
    return Replicates(found, offsets(law, points, found, target), df, correlation=correlation)


def offsets(law: Law, points: Points, theta_Sp: Array, y_Sn: Array) -> Array:
    """The constant of each run: the mean of y less the law."""
    if not law.offset_by_run:
        return np.zeros((*theta_Sp.shape[:-1], points.num_runs))
    return points.run_means(y_Sn - law.predict(theta_Sp, points.x_nc))


def degrees_of_freedom(law: Law, points: Points) -> int:
    """Points less what is fitted to them; at least 1."""
    return max(1, len(points) - len(law.params) - law.offset_by_run * points.num_runs)


def stretch_of(df: float, level: float = 0.95) -> float:
    """t / z.

    >>> round(stretch_of(4), 3), round(stretch_of(1000), 3)
    (1.417, 1.001)
    """
    return float(t.ppf((1 + level) / 2, df) / norm.ppf((1 + level) / 2))


def _run_weights(points: Points, num: int, rng: np.random.Generator) -> Array:
    """How often each run is drawn, `[S, R]`, as many of each stratum as there are."""
    weight = np.zeros((num, points.num_runs))
    for stratum in dict.fromkeys(points.strata):
        members = [i for i, one in enumerate(points.strata) if one == stratum]
        weight[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=num)
    return weight


def _new_targets(
    law: Law, points: Points, theta: Array, num: int, rng: np.random.Generator
) -> tuple[Array, int, float]:
    """The law with new residuals `[S, n]`, the degrees of freedom, and how alike neighbouring residuals are."""
    left = residuals(law, points, theta)
    offset = 0.0 if not law.offset_by_run else offsets(law, points, theta[None], points.y_n[None])[0][points.run_n]
    df = degrees_of_freedom(law, points)
    left = left - points.run_means(left)[points.run_n] if law.offset_by_run else left - left.mean()
    left = left * np.sqrt(len(points) / df)
    rho = neighbour_correlation(points, left)
    inside = np.diff(points.run_n, prepend=-1) == 0
    shock = np.where(inside, left - rho * np.roll(left, 1), left * np.sqrt(1 - rho**2))
    drawn = rng.choice(shock, size=(num, len(points)))
    if rho:
        drawn /= np.sqrt(1 - rho**2)  # where a run begins; the recursion takes it back
        for i in np.flatnonzero(inside):
            drawn[:, i] = rho * drawn[:, i - 1] + np.sqrt(1 - rho**2) * drawn[:, i]
    return law.predict(theta, points.x_nc) + offset + drawn, df, rho


def neighbour_correlation(points: Points, left_n: Array) -> float:
    """Of residuals next to each other in a run; 0 unless it is beyond chance, two standard errors."""
    inside = np.diff(points.run_n, prepend=-1) == 0
    if inside.sum() < 4 or not np.any(left_n):
        return 0.0
    rho = float((left_n * np.roll(left_n, 1))[inside].mean() / (left_n**2).mean())
    return min(rho, 0.95) if rho > 2 / np.sqrt(inside.sum()) else 0.0
