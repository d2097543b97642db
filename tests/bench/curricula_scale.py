"""Every curriculum with a million tasks: seconds of a choice and of an observation, of saving and loading, and memory.

python -m tests.bench.curricula_scale [--tasks 1000000]

Everything has been tried and drawn before, which is the worst case for the state. Each curriculum has a process of its
own, so that its peak of memory is its own; what the tasks themselves take is measured first and shown apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlpost.checkpoint import state_to_json
from rlpost.types import Outcome, Task

WAVE, GROUP, STEPS = 64, 8, 12


def arms() -> dict[str, Callable[..., Any]]:
    """The curricula, as a recipe would make them."""
    from curricula.adarft import Adarft
    from curricula.adcl import Adcl
    from curricula.difficulty_pool import DifficultyPool
    from curricula.irt import Irt
    from curricula.kimi import Kimi
    from curricula.learnable import Learnable
    from curricula.scalerl import Scalerl
    from curricula.seta import Seta
    from curricula.staged import Staged
    from curricula.uniform import Uniform

    return {
        "uniform": Uniform,
        "scalerl": Scalerl,
        "staged": partial(Staged, difficulty="level", stages=[{}]),
        "difficulty_pool": DifficultyPool,
        "adarft": partial(Adarft, difficulty="level"),
        "kimi": Kimi,
        "learnable": Learnable,
        "learnable mixed": partial(Learnable, weight="mixed", group_size=16, difficulty="level"),
        "irt": partial(Irt, text=False, difficulty="level"),
        "irt with text": Irt,
        "seta": Seta,
        "adcl": partial(Adcl, difficulty="level"),
    }


def main() -> None:
    """Print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", default=list(arms()))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-curricula-scale.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tasks)))
        return
    found = {}
    for name in options.only:
        command = [sys.executable, "-m", "tests.bench.curricula_scale", "--one", name, "--tasks", str(options.tasks)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], file=sys.stderr, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"tasks": options.tasks, "figures": found}, indent=2) + "\n")
    print(table(found))


def measure(name: str, size: int) -> dict[str, float]:
    """One curriculum."""
    tasks = [Task(f"k{i}", f"{i}+{i % 7}=", extra={"level": i * 7919 % 101}) for i in range(size)]
    before = peak_gib()
    curriculum, made_s = timed(lambda: arms()[name](tasks, seed=0))
    wear(curriculum, tasks)
    choices, observations = [], []
    for step in range(STEPS):
        chosen, seconds = timed(partial(curriculum.select, WAVE))
        choices.append(seconds)
        outcomes = [answer(task, i, step) for i, task in enumerate(chosen)]
        observations.append(timed(partial(curriculum.observe, outcomes))[1])
        curriculum.metrics()
    text, save_s = timed(lambda: state_to_json(curriculum.state_dict()))
    _, load_s = timed(lambda: curriculum.load_state_dict(json.loads(text)))
    return {
        "make_s": made_s,
        "select_ms": 1e3 * statistics.median(choices),
        "select_max_ms": 1e3 * max(choices),
        "observe_ms": 1e3 * statistics.median(observations),
        "observe_max_s": max(observations),
        "save_s": save_s,
        "load_s": load_s,
        "state_mb": len(text) / 1e6,
        "tasks_gib": before,
        "own_gib": peak_gib() - before,
    }


def wear(curriculum: Any, tasks: list[Task]) -> None:
    """A history of every task."""
    import numpy as np

    rng = np.random.default_rng(0)
    if hasattr(curriculum, "seen_at"):
        size = len(tasks)
        curriculum.passes[:], curriculum.fails[:] = rng.random((2, size)) * 8
        curriculum.seen_at[:], curriculum.drawn[:] = rng.integers(0, 9, size), rng.integers(1, 4, size)
        curriculum.drawn_at[:] = rng.permutation(size)
        curriculum.taken = size
        if hasattr(curriculum, "b"):
            curriculum.b[:] = rng.normal(0, 2, size)
    else:
        curriculum.observe([answer(task, i, 0) for i, task in enumerate(tasks)])


def answer(task: Task, i: int, step: int) -> Outcome:
    """Some answers of a group."""
    flags = tuple((i + j) % 3 == 0 for j in range(GROUP))
    return Outcome(task.key, tuple(map(float, flags)), 10 + step, flags)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def peak_gib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    columns = {
        "make_s": "made (s)",
        "select_ms": "select (ms)",
        "select_max_ms": "slowest select (ms)",
        "observe_ms": "observe (ms)",
        "observe_max_s": "slowest observe (s)",
        "save_s": "save (s)",
        "load_s": "load (s)",
        "state_mb": "state (MB)",
        "own_gib": "memory beside the tasks (GiB)",
    }
    lines = [f"| curriculum | {' | '.join(columns.values())} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, figures in found.items():
        lines.append(f"| {name} | {' | '.join(f'{figures[key]:.3g}' for key in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
