"""The options of `rlpost simulate`; no heavy library is loaded before they are read."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_simulations(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost simulate` and the options of its one simulation."""
    what = "a small experiment on the toy of a paper, without a model"
    names = commands.add_parser("simulate", help=what, description=what).add_subparsers(required=True, metavar="NAME")
    what = "whether more draws a step keep correct tokens from losing mass, arXiv:2510.01180"
    command = names.add_parser("brorl", help=what, description=what)
    add = partial(command.add_argument, metavar="X")
    add("--widths", type=int, nargs="+", default=[4, 8, 16, 512, 51_200], help="draws a step")
    command.add_argument("--optimizer", nargs="+", choices=["adamw", "sgd"], default=["adamw", "sgd"])
    add("--steps", type=int, default=1000)
    add("--vocab", type=int, default=128_000, help="number of tokens")
    add("--correct", type=int, default=10_000, help="how many of them are correct")
    add("--weight-decay", type=float, default=0.0, help="of adamw")
    add("--lr", type=float, help="default: 1e-3 for adamw, 100 for sgd")
    command.add_argument("--regime", choices=["seeded", "flat"], default="seeded", help="whether correct tokens lead")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/brorl"), help="folder for brorl.json and brorl.png")
    command.set_defaults(run=simulate_brorl)


def simulate_brorl(options: argparse.Namespace) -> None:
    """`rlpost simulate brorl`."""
    from rlpost.simulate.brorl import Settings, run

    settings = [
        Settings(
            optimizer=optimizer,
            width=width,
            steps=options.steps,
            vocab=options.vocab,
            num_correct=options.correct,
            lr=options.lr,
            weight_decay=options.weight_decay,
            regime=options.regime,
            seed=options.seed,
        )
        for optimizer in options.optimizer
        for width in options.widths
    ]
    run(settings, options.out)
