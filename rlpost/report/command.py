"""`rlpost report` and `rlpost watch`, and the report at the end of a run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rlpost.errors import RunError

REPORT = "one HTML page of some runs: curves, fits, curriculum, alarms, rollouts; it opens without a network"
WATCH = "a live view of a run in the terminal, of one that goes on or has ended"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The two commands and what they take."""
    command = commands.add_parser("report", help=REPORT, description=REPORT)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders, such as runs/quickstart")
    command.add_argument("--out", type=Path, help="(default: report.html in the run's folder; of several, in this one)")
    command.add_argument("--png", type=Path, metavar="DIR", help="the curves as PNG files as well")
    command.set_defaults(run=report)
    command = commands.add_parser("watch", help=WATCH, description=WATCH)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="such as runs/quickstart")
    command.add_argument("--once", action="store_true", help="print it once and leave")
    command.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    command.set_defaults(run=watch)


def report(options: argparse.Namespace) -> None:
    """`rlpost report`."""
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    print(f"report: {write_report(options.runs, out)}")
    if options.png is not None:
        from rlpost.report.plots import write_plots

        for file in write_plots(options.runs, options.png):
            print(f"picture: {file}")


def watch(options: argparse.Namespace) -> None:
    """`rlpost watch`."""
    from rlpost.watch import watch_run

    watch_run(options.run_folder, every_s=options.every, once=options.once)


def write_report(folders: Sequence[Path], out: Path, *, with_fits: bool = True) -> Path:
    """Write the page of some runs, whole or not at all."""
    from rlpost.history import read_history
    from rlpost.report.fits import LATER, fits_of
    from rlpost.report.page import render
    from rlpost.report.payload import payload
    from rlpost.report.rollouts import MOST_BYTES, read_rollouts

    histories = [read_history(folder) for folder in folders]
    rollouts = [read_rollouts(folder, MOST_BYTES // len(folders)) for folder in folders]
    fits = fits_of(folders) if with_fits else LATER
    data = payload(histories, [columns for columns, _ in rollouts], fits)
    names = [run["name"] for run in data["runs"]]
    title = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    page = render(title, data, [parts for _, parts in rollouts])
    whole = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(page, encoding="utf-8")
        os.replace(whole, out)
    except OSError as error:
        raise RunError(f"--out: {out} could not be written ({error.strerror or error}): name another file") from error
    return out


def report_of_finished(folder: Path) -> str:
    """Write a finished run's report, and say where it is; what may be wrong with it is no fault of the run."""
    try:
        return f"report: {write_report([folder], folder / 'report.html', with_fits=False)}"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        return f"warning: the run has ended well, but its report was not written: {type(error).__name__} {reason}"
