"""`rlpost synth` and its options."""

from __future__ import annotations

import argparse

WHAT = "find difficult tasks, train a generator on them, sample new ones, solve and filter them; goes on where it stood"


def add_synth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command and what it takes."""
    command = commands.add_parser(
        "synth", help=WHAT, description=f"{WHAT}. `rlpost synth show ID [RUN ...]` prints where one problem comes from."
    )
    command.add_argument("recipe", help="a YAML file with a `synth` section; or `show`")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as synth.sample.number=10000")
    command.add_argument("--stage", metavar="NAME", help="only this one, such as distil (default: all that are left)")
    command.add_argument("--part", metavar="I/N", default="0/1", help="with --stage: the I-th of N, from 0 on")
    command.set_defaults(run=synth)


def synth(options: argparse.Namespace) -> None:
    """`rlpost synth`."""
    from rlpost.synth.command import run_synth, show

    if options.recipe == "show":
        show(options.overrides)
    else:
        run_synth(options)
