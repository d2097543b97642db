"""`rlpost scaling fit` and `rlpost scaling ask`."""

from __future__ import annotations

import argparse
import json

from rlpost.errors import RunError
from rlpost.scaling.fit import Fit
from rlpost.scaling.fits import Fits, fit_runs, slopes


def run_fit(options: argparse.Namespace) -> None:
    """`rlpost scaling fit`: print the fits; with `--out`, write `fits.json` and a picture of each."""
    fits = fit_runs(options.runs, compute=options.compute, num=options.draws)
    print(told(fits))
    if options.out is None:
        return
    from rlpost.scaling.plots import figures

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fits.json").write_text(json.dumps(fits.to_dict(), indent=2) + "\n", encoding="utf-8")
    for name, picture in figures(fits).items():
        picture.savefig(options.out / f"{name}.png", dpi=120)
    print(f"fits: {options.out / 'fits.json'} and a picture of each")


def run_ask(options: argparse.Namespace) -> None:
    """`rlpost scaling ask`: what to do with a budget, or whether runs that go should go on."""
    from rlpost.scaling.ask import ask, early_stop

    if options.planned is None and not options.stop:
        fits = fit_runs(options.runs, compute=options.compute, num=options.draws)
        print(ask(fits, flops=options.budget, hours=options.hours))
        return
    if options.budget is not None or options.hours is not None:
        raise RunError("scaling ask takes a budget, or --stop with --planned (got both): ask one thing at a time")
    from rlpost.scaling.runs import read_runs

    for run in read_runs(options.runs, options.compute):
        print(f"{run.name}: {early_stop(run, planned=options.planned, worth=options.worth, num=options.draws)}")


def told(fits: Fits) -> str:
    """The fits as text."""
    parts = [_told(one) for one in fits.fits]
    if fits.notes:
        parts.append("\n".join(["not fitted:", *(f"  - {note}" for note in fits.notes)]))
    return "\n\n".join(parts)


def _told(one: Fit) -> str:
    lines = [
        f"{one.label}: {one.law.formula}",
        f"  {one.law.source}; {len(one.points)} points, {one.points.num_runs} runs",
    ]
    lines.append(f"  95 % intervals: {one.method}; R2 {one.r2:.4f}; a point is off by {one.noise:.3g}")
    lines += [f"  {estimate.name} = {estimate} {estimate.unit}: {estimate.meaning}" for estimate in one.estimates]
    if one.law.name == "power law":
        lines += [
            f"  k at N = {size:.3g}: {k} over {num} runs, no law of N assumed" for size, num, k in slopes(one.points)
        ]
    if one.held_out is not None:
        held = one.held_out
        lines.append(
            f"  last {1 - held.share:.0%} predicted from the first: error {held.error:.3g}, bias {held.bias:+.3g} "
            f"(staying where it was: {held.last_error:.3g}); {held.covered:.0%} of {held.num} points in their interval"
        )
    return "\n".join([*lines, *(f"  warning: {text}" for text in one.warnings)])
