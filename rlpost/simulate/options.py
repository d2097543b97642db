"""The options of `rlpost simulate`; no heavy library is loaded before they are read."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_simulations(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost simulate` and the options of its simulations."""
    what = "small experiments without a model: the toy of a paper, a cluster at work"
    names = commands.add_parser("simulate", help=what, description=what).add_subparsers(required=True, metavar="NAME")
    add_pipeline(names)
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


def add_pipeline(names: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of `rlpost simulate pipeline`."""
    what = "generation, training, weight sync, staleness and failures of a described cluster"
    command = names.add_parser("pipeline", help=what, description=what)
    what = "a YAML file and key=value, such as gpus=64; the keys stand in rlpost/simulate/cluster.py"
    command.add_argument("words", nargs="*", metavar="cluster.yaml key=value", help=what)
    what = "take lengths and rates from this run; in a pipeline's stead, of decoding from a synchronous one beside it"
    command.add_argument("--from-run", nargs="+", type=Path, metavar="RUN", help=what)
    what = "try splits of the GPUs and bounds on staleness up to max_staleness, for the most trained tokens a second"
    command.add_argument("--search", action="store_true", help=what)
    what = "for --search: other group sizes, at as many rollouts a step"
    command.add_argument("--group-sizes", type=int, nargs="+", default=[], metavar="N", help=what)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    what = "folder for pipeline.json and pipeline.png"
    command.add_argument("--out", type=Path, default=Path("runs/pipeline"), help=what)
    command.set_defaults(run=simulate_pipeline)


def simulate_pipeline(options: argparse.Namespace) -> None:
    """`rlpost simulate pipeline`."""
    from rlpost.simulate.pipeline_command import run

    run(options)


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
