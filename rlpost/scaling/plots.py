"""Pictures of fits: points with the law and its interval, and what the law leaves over."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlpost.scaling.fit import Fit
from rlpost.scaling.fits import Fits, slopes
from rlpost.scaling.largest import slope_at

_POINTS = 200
"""On a drawn curve."""
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart."""


def figures(fits: Fits) -> dict[str, Figure]:
    """A picture of each fit, by a name that can be a file's."""
    found = {}
    for one in fits.fits:
        name = re.sub(r"[^a-z0-9]+", "-", f"{one.law.name} {one.label}".lower()).strip("-")[:80]
        found[name] = figure(one)
        if one.law.name == "power law":
            found[f"{name}-slopes"] = slope_figure(one)
    return found


def figure(found: Fit) -> Figure:
    """The law on its points, above; the residuals, below."""
    picture = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = picture.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    points = found.points
    column = 1 if found.law.name.startswith("power law") else 0
    x_n = points.x_nc[:, column]
    colors = _colors(found)
    offset_R = found.offset_R
    for run in range(points.num_runs):
        mine = points.run_n == run
        upper.plot(x_n[mine], points.y_n[mine], ".", color=colors[run], ms=5, alpha=0.8)
        left = points.y_n[mine] - found.law.predict(found.theta, points.x_nc[mine]) - offset_R[run]
        lower.plot(x_n[mine], left, ".", color=colors[run], ms=5, alpha=0.8)
    _draw_law(found, upper, column, colors)
    lower.axhline(0, color="0.5", lw=1)
    upper.set(title=f"{found.label}\n{found.law.formula}", ylabel=found.y_name)
    lower.set(xlabel=f"log10 {found.x_name}" if column else found.x_name, ylabel="left over")
    handles, labels = upper.get_legend_handles_labels()
    if handles:
        upper.legend(handles, labels, fontsize=8)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    return picture


def _colors(found: Fit) -> list[str]:
    """One colour a stratum."""
    strata = list(dict.fromkeys(found.points.strata))
    return [_COLORS[strata.index(one) % len(_COLORS)] for one in found.points.strata]


def _draw_law(found: Fit, axis: Any, column: int, colors: list[str]) -> None:
    """A curve for each run where runs have constants, else one."""
    points, named = found.points, set()
    for run in range(points.num_runs if found.law.offset_by_run else 1):
        mine = points.run_n == run if found.law.offset_by_run else np.ones(len(points), bool)
        x_nc = np.tile(points.x_nc[mine][:1], (_POINTS, 1))
        x_nc[:, column] = np.linspace(points.x_nc[mine, column].min(), points.x_nc[mine, column].max(), _POINTS)
        value, low, high = found.predict(x_nc, run if found.law.offset_by_run else None)
        label = f"N = {x_nc[0, 0]:.3g}" if column and found.law.name == "power law" else found.law.name
        axis.plot(x_nc[:, column], value, color=colors[run], lw=1.2, label=None if label in named else label)
        axis.fill_between(x_nc[:, column], low, high, color=colors[run], alpha=0.12, lw=0)
        named.add(label)


def slope_figure(found: Fit) -> Figure:
    """k(N): the runs' own slopes by size, and the law with its interval."""
    picture = Figure(figsize=(7, 4), layout="constrained")
    axis = picture.subplots()
    seen = slopes(found.points)
    sizes = np.geomspace(seen[0][0] / 2, seen[-1][0] * 4, _POINTS)
    rows = []
    for size in sizes:
        k, many = slope_at(found, float(size))
        rows.append((k, *found.replicates.interval(many, k)))
    value, low, high = np.array(rows).T
    axis.plot(sizes, value, color=_COLORS[0], label=f"K_max = {found['K_max']}, N_0 = {found['N_0']}")
    axis.fill_between(sizes, low, high, color=_COLORS[0], alpha=0.15, lw=0)
    for size, num, own in seen:
        bars = [[own.value - own.low], [own.high - own.value]] if np.isfinite(own.low) else None
        axis.errorbar([size], [own.value], yerr=bars, fmt="o", color=_COLORS[1], capsize=3)
        axis.annotate(
            f"{num} run{'s' * (num != 1)}", (size, own.value), textcoords="offset points", xytext=(6, 4), fontsize=8
        )
    axis.set(xscale="log", xlabel="N (parameters without embeddings)", ylabel="k(N)", title=found.label)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return picture
