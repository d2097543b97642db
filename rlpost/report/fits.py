"""Scaling fits for the page, from `rlpost.scaling` where that is installed."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from rlpost.errors import RunError

NONE: dict[str, Any] = {"note": "No fits: this installation has no rlpost.scaling.", "every": []}
LATER: dict[str, Any] = {"note": "`rlpost report RUN` fits scaling laws and puts them here.", "every": []}


def fits_of(folders: Sequence[Path]) -> dict[str, Any]:
    """The fits of some runs as the page shows them: what was estimated, how well it foretells, and pictures."""
    if find_spec("rlpost.scaling") is None:
        return NONE
    from rlpost.scaling.fits import fit_runs
    from rlpost.scaling.plots import figure, slope_figure

    try:
        fits = fit_runs(folders)
    except RunError as error:
        return {"note": f"No fits: {error}", "every": []}
    every = []
    for one in fits.fits:
        pictures = [figure(one), *([slope_figure(one)] if one.law.name == "power law" else [])]
        every.append(
            card(one.to_dict()) | {"images": [[f"{one.label}, picture", png(picture)] for picture in pictures]}
        )
    return {"note": f"Not fitted: {'; '.join(fits.notes)}." if fits.notes else "", "every": every}


def card(fit: dict[str, Any]) -> dict[str, Any]:
    """A fit's title, table and remarks, from its plain JSON."""
    lines = [f"{fit['points']} points, {fit['runs']} runs; {fit['method']}; R2 {fit['r2']:.4f}. {fit['source']}"]
    if (ahead := fit["held_out"]) is not None:
        lines.append(
            f"Fitted to the first {ahead['share']:.0%} it is off by {ahead['error']:.3g} on the {ahead['num']} points "
            f"after them, and {ahead['covered']:.0%} of these lie in its interval."
        )
    lines += [f"Warning: {warning}." for warning in fit["warnings"]]
    return {
        "title": fit["label"],
        "formula": fit["formula"],
        "estimates": [estimate_row(one) for one in fit["parameters"]],
        "lines": lines,
    }


def estimate_row(estimate: dict[str, Any]) -> list[Any]:
    """(what, value, interval, meaning) of a parameter; one that the data cannot tell says so."""
    known = estimate["identified"]
    between = f"{estimate['low']:.3g} to {estimate['high']:.3g}" if known else "not identified"
    name = f"{estimate['name']} [{estimate['unit']}]" if estimate["unit"] not in ("", "1") else estimate["name"]
    return [name, f"{estimate['value']:.4g}", between, estimate["meaning"]]


def png(picture: Any) -> str:
    """A matplotlib figure as a URL of itself."""
    file = BytesIO()
    picture.savefig(file, format="png", dpi=95)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
