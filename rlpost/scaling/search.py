"""Least squares: one fit from many starts with scipy, and many fits at once for bootstrap and profiles.

Shapes: `S` fits at once, `n` points, `p` parameters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from rlpost.scaling.laws import Array, Law
from rlpost.scaling.points import Points

_SMALL = 1e-6
"""Step of the numeric derivative, on a scale where parameters are of order one."""
_DONE = 1e-8
"""Share of the sum of squares that a further step must promise to be worth taking."""


def fitted(law: Law, points: Points) -> Array:
    """The parameters with the least sum of squares: all starts at once, the best of them polished by scipy."""
    starts = np.clip(law.starts(points.x_nc, points.y_n), *law.box(points.x_nc, points.y_n))
    target = np.broadcast_to(points.y_n, (len(starts), len(points)))
    candidates = fit_many(law, points, target, starts)
    best = candidates[np.nanargmin(_squares(law, points, target, candidates))]
    low, high = law.box(points.x_nc, points.y_n)
    inside = np.clip(best, low + 1e-9, high - 1e-9)
    found = least_squares(lambda theta: residuals(law, points, theta), inside, bounds=(low, high), x_scale="jac")
    return np.asarray(found.x)


def residuals(law: Law, points: Points, theta: Array, y_n: Array | None = None) -> Array:
    """y less the law, and less the run's own constant where the law has one."""
    left = (points.y_n if y_n is None else y_n) - law.predict(theta, points.x_nc)
    return points.centred(left) if law.offset_by_run else left


def fit_many(
    law: Law,
    points: Points,
    y_Sn: Array,
    start_Sp: Array,
    *,
    weight_Sn: Array | None = None,
    fixed_p: Array | None = None,
    iterations: int = 60,
) -> Array:
    """Levenberg-Marquardt inside the law's box, all fits at once; parameters that are `fixed` stay where they start."""
    low, high = law.box(points.x_nc, points.y_n)
    theta = np.clip(start_Sp, low, high)
    weight = np.ones_like(y_Sn) if weight_Sn is None else weight_Sn
    damping = np.full(len(theta), 1e-3)
    left = residuals(law, points, theta, y_Sn)
    loss = (weight * left**2).sum(-1)
    for _ in range(iterations):
        slope = _jacobian(law, points, theta)
        pull = np.einsum("snp,sn->sp", slope, weight * left)
        curve = (slope * weight[:, :, None]).transpose(0, 2, 1) @ slope
        stuck = ((theta <= low) & (pull < 0)) | ((theta >= high) & (pull > 0))
        if fixed_p is not None:
            stuck |= fixed_p.astype(bool)
        pull = np.where(stuck, 0.0, pull)
        step = _step(curve, pull, stuck, damping)
        trial = np.clip(theta + step, low, high)
        trial_left = residuals(law, points, trial, y_Sn)
        trial_loss = (weight * trial_left**2).sum(-1)
        better = trial_loss < loss
        done = ((step * pull).sum(-1) <= _DONE * loss) | (better & (loss - trial_loss <= _DONE * loss))
        theta, left = np.where(better[:, None], trial, theta), np.where(better[:, None], trial_left, left)
        loss = np.where(better, trial_loss, loss)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-12, 1e12)
        if done.all():
            break
    return theta


def _squares(law: Law, points: Points, y_Sn: Array, theta_Sp: Array) -> Array:
    return (residuals(law, points, theta_Sp, y_Sn) ** 2).sum(-1)


def _jacobian(law: Law, points: Points, theta_Sp: Array) -> Array:
    """d law / d theta, by central differences."""
    columns = []
    for i in range(theta_Sp.shape[-1]):
        shift = np.zeros(theta_Sp.shape[-1])
        shift[i] = _SMALL
        rise = law.predict(theta_Sp + shift, points.x_nc) - law.predict(theta_Sp - shift, points.x_nc)
        columns.append((points.centred(rise) if law.offset_by_run else rise) / (2 * _SMALL))
    return np.stack(columns, axis=-1)


def _step(curve_Spp: Array, pull_Sp: Array, stuck_Sp: NDArray[np.bool_], damping_S: Array) -> Array:
    """The damped step; parameters that are stuck do not move."""
    free = ~stuck_Sp
    kept = curve_Spp * (free[:, :, None] & free[:, None, :])
    size = np.einsum("spp->sp", curve_Spp)
    own = damping_S[:, None] * np.maximum(size, 1e-30) + 1e-14 * size.max(-1, keepdims=True) + 1e-30
    ridge = np.where(stuck_Sp, 1.0, own)
    damped = kept + ridge[:, :, None] * np.eye(kept.shape[-1])
    return np.asarray(np.linalg.solve(damped, pull_Sp[:, :, None])[:, :, 0], dtype=float)
