"""What accounts, logging and the gradient noise scale take of a step: shares of one run's processor time.

    python -m tests.bench.accounts

The quickstart after a short supervised part, every second step measured. Seconds are the processor's and not the
clock's, so that other work on the machine does not count; all of a run is in this process, vLLM included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.against_trl import fresh

LOGGING_TARGET, NOISE_TARGET = 0.02, 0.03
EVERY = 2
QUICKSTART = "recipes/quickstart.yaml"


class Stopwatch:
    """Processor seconds of the present step by name; calls inside of one that is timed count for that one."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._busy = False

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return call(*args, **kwargs)
            self._busy, started = True, time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._now[name] += time.process_time() - started
                self._busy = False

        return wrapped

    def step(self, call: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        """A training step, after which the seconds are put down with its figures."""

        def wrapped(*args: Any, **kwargs: Any) -> dict[str, float]:
            started = time.process_time()
            figures = call(*args, **kwargs)
            self._now |= {"step": time.process_time() - started, "tokens": figures["tokens/processed"]}
            self._now["measured"] = float("noise/prompts" in figures)
            self.steps.append(dict(self._now))
            self._now.clear()
            return figures

        return wrapped


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-accounts"))
    options = parser.parse_args()
    result = measure(options.out, steps=options.steps, sft_steps=options.sft_steps)
    (options.out / "accounts.json").write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(result))


def measure(out: Path, *, steps: int = 21, sft_steps: int = 100) -> dict[str, Any]:
    """Shares of a step; the first step, which warms up, is not counted."""
    from rlpost import figures, train
    from rlpost.__main__ import quiet
    from rlpost.accounts import Accounts
    from rlpost.check import load_and_check
    from rlpost.world import World

    quiet()
    watch, folder = Stopwatch(), fresh(out / "run")
    for name in ("passed", "generated"):
        setattr(Accounts, name, watch.timed("accounts", getattr(Accounts, name)))
    for name in ("log_rollouts", "log_step"):
        setattr(figures, name, watch.timed("logging", getattr(figures, name)))
    for name in ("make_batches", "update"):  # measured prompts are packed and trained apart
        setattr(train, name, watch.timed("train", getattr(train, name)))
    train.train_step = watch.step(train.train_step)  # type: ignore[assignment]
    asked = [f"run_dir={folder.parent}", f"name={folder.name}", f"steps={steps}", f"sft.steps={sft_steps}"]
    asked += [f"logging.noise_every={EVERY}", "tasks.eval=null", "save_every=0"]
    asked += ["algorithm.groups.without_spread=keep"]  # so that every step trains as much
    world = World().start()
    train.train(load_and_check(QUICKSTART, asked), world)
    world.stop()
    return shares(watch.steps[1:])


def shares(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Of the steps' processor time; what measuring adds to training, by token, as many steps with it as without."""
    whole = sum(step["step"] for step in steps)
    rates = {
        flag: [step["train"] / step["tokens"] for step in steps if step["measured"] == flag] for flag in (0.0, 1.0)
    }
    more = statistics.median(rates[1.0]) / statistics.median(rates[0.0]) - 1
    plain = [step["train"] / step["step"] for step in steps if not step["measured"]]
    from rlpost.recipe import Logging

    return {
        "steps": len(steps),
        "step_s": whole / len(steps),
        "accounts_frac": sum(step["accounts"] for step in steps) / whole,
        "logging_frac": sum(step["logging"] for step in steps) / whole,
        "measured_step_frac": more * statistics.median(plain),
        "noise_frac": more * statistics.median(plain) / Logging().noise_every,
    }


def table(result: dict[str, Any]) -> Table:
    """The shares beside their targets."""
    found = Table("", "share of a step", "target", title=f"{result['steps']} steps of {result['step_s']:.2f} s")
    both = result["accounts_frac"] + result["logging_frac"]
    found.add_row("accounts", f"{result['accounts_frac']:.2%}", "")
    found.add_row("logging, all figures and files", f"{result['logging_frac']:.2%}", "")
    found.add_row("both", f"{both:.2%}", f"{LOGGING_TARGET:.0%}")
    found.add_row("noise scale, of a step that is measured", f"{result['measured_step_frac']:.2%}", "")
    found.add_row("noise scale, as often as by default", f"{result['noise_frac']:.2%}", f"{NOISE_TARGET:.0%}")
    return found


if __name__ == "__main__":
    main()
