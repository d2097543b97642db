"""The options of `rlpost scaling`; no heavy library is loaded before they are read."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_scaling(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost scaling` and the options of its two questions."""
    what = "what runs say of more compute, data or batch: laws, intervals, advice"
    names = commands.add_parser("scaling", help=what, description=what).add_subparsers(required=True, metavar="NAME")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or folders of such folders")
    what = "FLOPs: all but evaluation, or 6 N T of what is trained (default: total)"
    shared.add_argument("--compute", choices=["total", "six_nt"], default="total", help=what)
    shared.add_argument("--draws", type=int, default=500, metavar="N", help="of the bootstrap (default: 500)")
    what = "fit power laws, sigmoids, batch size, data reuse and entropy to finished or running runs"
    command = names.add_parser("fit", help=what, description=what, parents=[shared])
    command.add_argument("--out", type=Path, metavar="DIR", help="write fits.json and a picture of each fit there")
    command.set_defaults(run=scaling_fit)
    what = "what to do with a budget, or whether a run should go on"
    command = names.add_parser("ask", help=what, description=what, parents=[shared])
    add = partial(command.add_argument, type=float, metavar="X")
    add("--budget", help="FLOPs, counted as --compute says")
    add("--hours", help="of one device such as the runs had")
    command.add_argument("--stop", action="store_true", help="instead: whether each run should go on to its last step")
    add("--planned", help="the same, to this step")
    add("--worth", default=0.01, help="pass@1 that the remaining steps should add (default: 0.01)")
    command.set_defaults(run=scaling_ask)


def scaling_fit(options: argparse.Namespace) -> None:
    """`rlpost scaling fit`."""
    from rlpost.scaling.command import run_fit

    run_fit(options)


def scaling_ask(options: argparse.Namespace) -> None:
    """`rlpost scaling ask`."""
    from rlpost.scaling.command import run_ask

    run_ask(options)
