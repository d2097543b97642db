"""The options of `rlpost eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_eval(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], run: Callable[[argparse.Namespace], None]
) -> None:
    """`rlpost eval`."""
    what = "pass@k, maj@k, lengths and intervals of a model on data sets, or of a recipe's model on its tasks.eval"
    command = commands.add_parser("eval", help=what, description=what)
    command.add_argument("target", metavar="MODEL", help="a folder, hub name or .gguf file; or a recipe.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.temperature=0.6")
    what = "gsm8k, svamp, math500; gsm8k=FILE for a file of yours; a YAML file with `tasks` and `rewards`"
    command.add_argument("--tasks", nargs="+", default=[], metavar="SET", help=what)
    command.add_argument("-k", type=numbers, metavar="K,K", help="pass@k and maj@k of these; n is the largest of them")
    command.add_argument("-n", type=int, metavar="N", help="answers a problem (default: evaluation.n)")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each set")
    what = "try problems that few answers solve on, up to MAX times: an unbiased pass rate of rare successes"
    command.add_argument("--passuntil", type=int, metavar="MAX", help=what)
    what = "what another evaluation wrote (--out): differences on the problems that both have, with intervals"
    command.add_argument("--against", type=Path, metavar="DIR", help=what)
    what = "where result.json and answers.jsonl go (default: below runs/evaluations; for a recipe: nowhere)"
    command.add_argument("--out", type=Path, metavar="DIR", help=what)
    command.set_defaults(run=run)


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, with commas between.

    >>> numbers("1,4,16")
    [1, 4, 16]
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, as in 1,4,16 (got {text!r})")
    return found


def asked_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the recipe's `evaluation`."""
    asked: dict[str, Any] = {}
    if options.k:
        asked |= {"k": sorted(options.k), "n": max(options.k)}
    if options.n:
        asked["n"] = options.n
    if options.passuntil:
        asked["until"] = options.passuntil
    return asked


def out_of(options: argparse.Namespace, *, recipe: bool) -> Path | None:
    """The folder to write to: `runs/gsm8k/model` goes to `runs/evaluations/gsm8k-model`."""
    if options.out is not None or (recipe and not options.tasks):
        return options.out
    parts = [part for part in Path(options.target).parts[-2:] if part not in ("/", "..", "~")]
    return Path("runs/evaluations") / "-".join(parts).removesuffix(".gguf").removesuffix(".yaml")
