"""Runs of the command line, and what they logged."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def rlpost(
    command: str, recipe: str | Path, overrides: Sequence[str] = (), *, ranks: int = 1, threads: int | None = None
) -> str:
    """Run one command on a recipe, and return what it printed; `threads` of each rank."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
        start += [f"--master-port={_free_port()}", "-m"]
    arguments = [*start, "rlpost", command, str(recipe), *overrides]
    print("$", " ".join(arguments[1:]), file=sys.stderr, flush=True)
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    return subprocess.run(arguments, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=True).stdout


def train(
    recipe: str | Path, folder: Path, overrides: Sequence[str] = (), *, ranks: int = 1, threads: int | None = None
) -> list[dict[str, Any]]:
    """The logged steps of a run in `folder`, which must not hold one yet; nothing is saved or drawn that costs time."""
    quiet = ["save_every=0", "logging.tensorboard=false", "logging.samples_per_step=0"]
    mine = [f"run_dir={folder.parent}", f"name={folder.name}"]
    rlpost("train", recipe, [*overrides, *mine, *quiet], ranks=ranks, threads=threads)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def base_model(recipe: str | Path, folder: Path, overrides: Sequence[str] = (), *, threads: int | None = None) -> Path:
    """The model that the recipe's `sft` section makes, made once for each `folder`."""
    output = rlpost("sft", recipe, [*overrides, f"run_dir={folder}"], threads=threads)
    [line] = [line for line in output.splitlines() if line.startswith("model: ")]
    return Path(line.removeprefix("model: "))


def export(folder: Path) -> Path:
    """A run's newest checkpoint as a model folder, in the run's folder."""
    arguments = [sys.executable, "-m", "rlpost", "export", str(folder)]
    subprocess.run(arguments, stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
    return folder / "model"


def median(steps: Sequence[dict[str, Any]], key: str) -> float:
    """Of all steps but the first, which warms up; a step without the figure counts as 0."""
    return statistics.median(step.get(key, 0.0) for step in steps[1:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
