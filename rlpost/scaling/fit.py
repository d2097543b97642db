"""A law fitted to points: parameters with intervals, how far it extrapolates, and what the data cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from rlpost.errors import RunError
from rlpost.scaling.bootstrap import Replicates, degrees_of_freedom, offsets, replicate
from rlpost.scaling.laws import Array, Law
from rlpost.scaling.points import Points
from rlpost.scaling.search import fit_many, fitted, residuals

LEVEL = 0.95
"""Of every interval."""
FIRST = 0.6
"""Share of each run's points from which the rest is predicted."""
WIDE = 10.0
"""Upper over lower end of an interval from which on a parameter counts as not known."""
TIED = 0.98
"""Correlation of two parameters from which on only a combination of them is known."""


@dataclass(frozen=True)
class Estimate:
    """A parameter and its interval."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    meaning: str = ""
    identified: bool = True
    """Whether the data say where it is; if not, a warning of the fit says why."""

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}){'' if self.identified else ' ?'}"


@dataclass(frozen=True)
class HeldOut:
    """The last points of each run, predicted from the first."""

    share: float
    """Of each run's points that the law was fitted to."""
    num: int
    """Points that were predicted."""
    error: float
    """Mean |prediction - point|, in the unit of y."""
    bias: float
    """Mean prediction - point."""
    last_error: float
    """The same error of the last fitted value of each run, which knows no law."""
    covered: float
    """Share of the points inside their prediction's interval."""


@dataclass(frozen=True)
class Fit:
    """One law on one set of points."""

    law: Law
    label: str
    """What was fitted to what."""
    y_name: str
    x_name: str
    points: Points
    theta: Array
    replicates: Replicates
    estimates: tuple[Estimate, ...]
    r2: float
    noise: float
    """Standard deviation of a point about the law."""
    held_out: HeldOut | None
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> Estimate:
        return next(one for one in self.estimates if one.name == name)

    @property
    def method(self) -> str:
        """Where the intervals come from, in words."""
        num = len(self.replicates.theta_Sp)
        if self.replicates.method == "runs":
            return f"bootstrap over whole runs, {num} draws"
        how = f", autocorrelation {self.replicates.correlation:.2f}" if self.replicates.correlation else ""
        return f"bootstrap of residuals, {num} draws{how}"

    @property
    def offset_R(self) -> Array:
        """The constant of each run."""
        return offsets(self.law, self.points, self.theta[None], self.points.y_n[None])[0]

    def predict(self, x_nc: Array, run: int | None = None) -> tuple[Array, Array, Array]:
        """The law at new points, and its interval, of one run where each has a constant."""
        own, drawn = (0.0, np.zeros((len(self.replicates.theta_Sp), 1)))
        if run is not None:
            own, drawn = self.offset_R[run], self.replicates.offset_SR[:, run : run + 1]
        value = self.law.predict(self.theta, x_nc) + own
        many = self.law.predict(self.replicates.theta_Sp, x_nc) + drawn
        ends = [self.replicates.interval(many[:, i], value[i], LEVEL) for i in range(len(value))]
        low, high = np.array(ends).T if ends else (value, value)
        return value, low, high

    def to_dict(self) -> dict[str, Any]:
        """Everything but the points, as plain JSON."""
        return {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "label": self.label,
            "x": self.x_name,
            "y": self.y_name,
            "points": len(self.points),
            "runs": self.points.num_runs,
            "level": LEVEL,
            "method": self.method,
            "parameters": [vars(one) for one in self.estimates],
            "r2": self.r2,
            "noise": self.noise,
            "held_out": vars(self.held_out) if self.held_out else None,
            "warnings": list(self.warnings),
        }


def fit(
    law: Law,
    points: Points,
    *,
    label: str = "",
    x_name: str = "x",
    y_name: str = "y",
    num: int = 500,
    seed: int = 0,
    extrapolate: bool = True,
) -> Fit:
    """Fit a law; `num` bootstrap draws. Raises where there are fewer points than what is fitted to them."""
    needed = len(law.params) + law.offset_by_run * points.num_runs
    if len(points) <= needed:
        raise RunError(
            f"{label or law.name}: there must be more points than fitted numbers (got {len(points)} points, {needed} "
            "numbers): evaluate more often (evaluation.every), or give more runs"
        )
    theta = fitted(law, points)
    replicates = replicate(law, points, theta, num=num, seed=seed)
    left = residuals(law, points, theta)
    total = points.centred(points.y_n) if law.offset_by_run else points.y_n - points.y_n.mean()
    estimates, warnings = _estimates(law, points, theta, replicates)
    found = Fit(
        law=law,
        label=label or law.name,
        y_name=y_name,
        x_name=x_name,
        points=points,
        theta=theta,
        replicates=replicates,
        estimates=estimates,
        r2=float(1 - (left**2).sum() / (total**2).sum()) if np.any(total) else 0.0,
        noise=float(np.sqrt((left**2).sum() / degrees_of_freedom(law, points))),
        held_out=None,
        warnings=tuple(warnings),
    )
    return replace(found, held_out=hold_out(found, num=num, seed=seed)) if extrapolate else found


def _estimates(
    law: Law, points: Points, theta: Array, replicates: Replicates
) -> tuple[tuple[Estimate, ...], list[str]]:
    """Each parameter with its interval, and why some are not identified."""
    flat, tied = flat_sides(law, points, theta), tied_pairs(law, replicates)
    low, high = law.box(points.x_nc, points.y_n)
    found, warnings = [], []
    for i, param in enumerate(law.params):
        ends = replicates.interval(replicates.theta_Sp[:, i], float(theta[i]), LEVEL)
        value, *known = (float(param.natural(end)) for end in (theta[i], *np.clip(ends, low[i], high[i])))
        why = _why_unknown(param.log, known, flat[i])
        if why:
            warnings.append(f"{param.name} is not identified: {why}")
        elif any(i in pair for pair in tied):
            why = "tied"
        found.append(Estimate(param.name, value, known[0], known[1], param.unit, param.meaning, not why))
    for a, b in tied:
        names = f"{law.params[a].name} and {law.params[b].name}"
        warnings.append(f"{names} trade for each other (correlation beyond {TIED}): only a combination is known")
    return tuple(found), warnings


def _why_unknown(log: bool, ends: Sequence[float], flat: str) -> str:
    """What keeps the data from saying where a parameter is; empty where they do."""
    if flat:
        return f"values without bound to {flat} fit as well"
    if log and ends[1] > WIDE * ends[0]:
        return f"its interval spans a factor of {ends[1] / ends[0]:.3g}"
    return ""


def flat_sides(law: Law, points: Points, theta: Array) -> list[str]:
    """For each parameter: the sides on which the fit stays as good up to the end of its box, by an F test.

    The parameter is held at the end and the others are fitted anew.
    """
    num_p = len(law.params)
    low, high = law.box(points.x_nc, points.y_n)
    df = degrees_of_freedom(law, points)
    least = float((residuals(law, points, theta) ** 2).sum())
    bound = least * (1 + float(f_distribution.ppf(LEVEL, 1, df)) / df) + 1e-18
    starts, fixed = np.tile(theta, (2 * num_p, 1)), np.zeros((2 * num_p, num_p))
    for i in range(num_p):
        starts[2 * i, i], starts[2 * i + 1, i] = low[i], high[i]
        fixed[2 * i : 2 * i + 2, i] = 1
    target = np.broadcast_to(points.y_n, (2 * num_p, len(points)))
    profile = fit_many(law, points, target, starts, fixed_p=fixed)
    fits = (residuals(law, points, profile, target) ** 2).sum(-1) <= bound
    words = []
    for i in range(num_p):
        sides = [word for word, good in (("below", fits[2 * i]), ("above", fits[2 * i + 1])) if good]
        words.append(" and ".join(sides))
    return words


def tied_pairs(law: Law, replicates: Replicates) -> list[tuple[int, int]]:
    """Pairs of parameters that the replicates move together."""
    spread = replicates.theta_Sp.std(0)
    pairs = [(a, b) for a in range(len(spread)) for b in range(a) if spread[a] > 1e-9 and spread[b] > 1e-9]
    if not pairs:
        return []
    with np.errstate(invalid="ignore"):  # one that never moves has no correlation, and is in no pair
        alike = np.corrcoef(replicates.theta_Sp.T)
    return [(b, a) for a, b in pairs if abs(alike[a, b]) > TIED]


def hold_out(found: Fit, *, share: float = FIRST, num: int = 500, seed: int = 0) -> HeldOut | None:
    """Fit the first `share` of each run's points and predict the rest; None where too few are left for that."""
    law, points = found.law, found.points
    early = points.first(share)
    first, rest = points.take(early), points.take(~early)
    has_rest = np.isin(np.arange(points.num_runs), points.run_n[~early])
    needed = len(law.params) + law.offset_by_run * first.num_runs
    if len(first) <= needed or not len(rest) or first.num_runs < points.num_runs:
        return None
    part = fit(law, first, num=num, seed=seed, extrapolate=False)
    run_n = np.flatnonzero(has_rest)[rest.run_n]
    value, low, high = prediction(part, rest.x_nc, run_n, seed=seed)
    last_n = np.array([first.y_n[first.run_n == run][-1] for run in run_n])
    return HeldOut(
        share=share,
        num=len(rest),
        error=float(np.abs(value - rest.y_n).mean()),
        bias=float((value - rest.y_n).mean()),
        last_error=float(np.abs(last_n - rest.y_n).mean()),
        covered=float(((low <= rest.y_n) & (rest.y_n <= high)).mean()),
    )


def prediction(part: Fit, x_nc: Array, run_n: NDArray[np.int64], *, seed: int = 0) -> tuple[Array, Array, Array]:
    """New points of runs that were fitted, and the interval in which such a point should be: all noise counted."""
    law, rng = part.law, np.random.default_rng(seed)
    own = part.offset_R[run_n]
    value = law.predict(part.theta, x_nc) + own
    drawn = law.predict(part.replicates.theta_Sp, x_nc) + part.replicates.offset_SR[:, run_n]
    # Resampled runs keep their points, so that the noise in a run's own constant is not among what was drawn.
    share = law.offset_by_run and part.replicates.method == "runs"
    counts = np.bincount(part.points.run_n)[run_n]
    noise = rng.normal(size=drawn.shape) * part.noise * np.sqrt(1 + share / counts)
    ends = [part.replicates.interval(column, at, LEVEL) for column, at in zip((drawn + noise).T, value, strict=True)]
    low, high = np.array(ends).T
    return value, low, high
