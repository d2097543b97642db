"""`rlpost` in this process, with a signal to itself at the moment in which a phase of its clock begins.

python interrupted.py LAB NAME PHASE:COUNT:SIGNAL[,PHASE:COUNT:SIGNAL...] ...: for each argument after LAB and NAME a
run that is interrupted so, started again until it ends, and the exit code of every start as a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from rlpost.__main__ import main, quiet
from rlpost.clock import Clock
from rlpost.preempt import preemption
from rlpost.world import World

OWN = ("generator.kind=hf", "steps=4", "evaluation.every=1", "save_every=0", "sft=null", "algorithm.kl.coef=0.1")
STARTS = 6


def interrupting(orders: str) -> None:
    """Let the clock send the signals: the COUNT-th time that PHASE begins in one start."""
    left = {}
    for order in filter(None, orders.split(",")):
        phase, count, name = order.split(":")
        left.setdefault((phase, int(count)), []).append(getattr(signal, name))
    begun: dict[str, int] = {}
    plain = vars(Clock).get("plain", Clock.__call__)
    Clock.plain = plain

    @contextmanager
    def call(self, phase):
        with plain(self, phase):
            begun[phase] = begun.get(phase, 0) + 1
            for number in left.pop((phase, begun[phase]), []):
                os.kill(os.getpid(), number)
            yield

    Clock.__call__ = call


def start(lab: Path, name: str, *overrides: str) -> int:
    preemption.reset()
    return main(["train", str(lab / "tiny.yaml"), f"run_dir={lab / 'runs'}", f"name={name}", *OWN, *overrides])


def run(lab: Path, name: str, orders: str, *overrides: str) -> list[int]:
    """The exit code of every start until the run has ended."""
    codes = []
    for _ in range(STARTS):
        interrupting(orders if not codes else "")
        codes.append(start(lab, name, "resume=auto", *overrides))
        if codes[-1] == 0:
            break
    return codes


if __name__ == "__main__":
    quiet()
    World.stop = lambda self: None  # DeepSpeed keeps the process group of its first run
    lab, name, *every = sys.argv[1:]
    for i, orders in enumerate(every):
        print("codes:", json.dumps(run(Path(lab), f"{name}-{i}", orders)), flush=True)
