"""Runs that are killed by SIGKILL again and again must end as the run that nobody killed, number by number.

    python -m tests.bench.torture --kills 50 --ranks 1 2 [--out runs/torture]

A real run of the command line, one process or several of ZeRO-3. They are forked from this one, which has imported the
libraries once, and all killed together at a random instant: in a phase that is drawn first, or while a checkpoint is
being written. Then it goes on with `resume=auto`. What it logged, what it sampled and its weights are compared with
those of the run that was left alone. Each process marks the phase that it is in; nothing else of the program differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpost.__main__ import main as main_of_rlpost
from rlpost.checkpoint import STEP_FOLDER
from rlpost.clock import Clock

STEPS = 12
START = ("start", "setup")
PHASES = (*START, "evaluate", "sync", "generate", "reward", "score", "train", "log", "checkpoint", "saving")
"""`saving`: while the folder of a checkpoint that is not whole is there, whatever the loop does meanwhile."""
VARYING = (
    "unix_s",
    "time/",
    "reward/latency/",
    "total/device_s",
    "energy/",
    "total/energy",
    "sync/seconds",
    "sync/gb_per_s",
    "memory/",
)
LONGEST_S = 1500
RECIPE = """
steps: STEPS
save_every: 1
prompts_per_step: 4
model:
  dtype: float32
  context: 64
  init: {tokenizer: char, alphabet: "0123456789+-=;#", hidden_size: 64, intermediate_size: 256, num_layers: 2,
         num_heads: 2}
tasks:
  train: {path: "rlpost.testbed:chain_sums", config: {split: train, size: 64, min_terms: 2, max_terms: 3}}
  eval: {path: "rlpost.testbed:chain_sums", config: {split: eval, size: 4, min_terms: 2, max_terms: 3}}
rewards: [{use: "tortured:sevens"}]
curriculum: {use: difficulty_pool, half_life: 3.0}
algorithm: {name: grpo, kl: {coef: 0.01, reset: {every: 5}}}
sampling: {group_size: 4, max_new_tokens: 8}
engine: {lr: 1.0e-3, zero_stage: 3, schedule: linear, warmup_steps: 2}
generator: {kind: hf}
evaluation: {n: 2, every: 4}
logging: {tensorboard: true, samples_per_step: 1000}
"""


REWARD = """
def sevens(rollout) -> float:
    return rollout.text.count("7") / len(rollout.token_ids)
"""


def main() -> None:
    """Torture, print what happened as JSON, and fail where anything but the lost time differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"))
    options = parser.parse_args()
    found = {}
    for ranks in options.ranks:
        folder, how = options.out / f"ranks-{ranks}", {"seed": options.seed, "steps": options.steps}
        found[str(ranks)] = torture(folder, options.kills, ranks=ranks, **how)
        print(json.dumps({str(ranks): found[str(ranks)]}), flush=True)
    (options.out / "torture.json").write_text(json.dumps(found, indent=2) + "\n")
    if any(one["differences"] or one["repeated_prompts"] or one["corrupt_loads"] for one in found.values()):
        sys.exit("a run that was killed differs from one that was not")


def torture(out: Path, kills: int, *, ranks: int, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
    """Kill runs so often, each time going on after it, and compare every one that ends with the run left alone."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = out.absolute() / "torture.yaml"
    recipe.with_name("tortured.py").write_text(REWARD)
    recipe.write_text(RECIPE.replace("STEPS", str(steps)))
    dice = random.Random(f"{seed}:{ranks}")
    preload()
    whole = Job(recipe, out.absolute(), "alone", ranks)
    whole.start()
    every = Report(whole)
    while len(every.kills) < kills:
        job = Job(recipe, out.absolute(), f"killed-{every.ended}", ranks)
        plan = [dice.choice(PHASES) for _ in range(min(dice.randint(3, 6), kills - len(every.kills)))]
        for phase in plan:
            every.kill(job, phase, dice)
        job.start()
        every.compare(job)
    return every.summary()


class Job:
    """One run and its processes, started as often as it is killed."""

    def __init__(self, recipe: Path, out: Path, name: str, ranks: int) -> None:
        self.recipe, self.out, self.name, self.ranks = recipe, out, name, ranks
        self.folder = out / "runs" / name
        self.marks = out / f"marks-{name}"
        self.marks.mkdir(exist_ok=True)
        self.log = out / f"{name}.log"

    def start(self, phase: str | None = None, dice: random.Random | None = None) -> str | None:
        """Run it, and kill it in a phase; the phases that it was killed in, or None where it has ended before."""
        port = _free_port()
        for rank in range(self.ranks):
            (self.marks / str(rank)).write_text("start")
        pids = [self._fork(rank, port) for rank in range(self.ranks)]
        codes: dict[int, int] = {}
        times, seen, was, until = 1 if dice is None else dice.randint(1, 3), 0, False, time.monotonic() + LONGEST_S
        while len(codes) < len(pids) and time.monotonic() < until:
            codes |= {pid: code for pid, code in _ended(pids) if pid}
            now = phase in self.phases()
            seen, was = seen + (now and not was), now
            if dice is not None and now and not codes and (seen >= times or phase in START):
                time.sleep(dice.uniform(0, 1.5 if phase in START else 0.15))
                break
            time.sleep(0.005)
        hit = "+".join(sorted(self.phases()))
        left = [pid for pid in pids if pid not in codes]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            codes[pid] = os.waitpid(pid, 0)[1]
        assert all(code in (0, signal.SIGKILL) for code in codes.values()), self.said()
        if not left:
            return None
        assert dice is not None, f"not ended after {LONGEST_S} s: {self.said()}"
        return hit

    def _fork(self, rank: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        with self.log.open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(self.out)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = 1
        try:
            code = run_marked(self.marks / str(rank), self._command())
        except BaseException:  # the child must never come back into the parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _command(self) -> list[str]:
        return ["train", str(self.recipe), f"run_dir={self.out / 'runs'}", f"name={self.name}", "resume=auto"]

    def phases(self) -> set[str]:
        """What the ranks are doing."""
        found = {mark.read_text().strip() for mark in self.marks.iterdir()} - {""}
        saving = any((self.folder / "checkpoints").glob("tmp-step-*"))
        return found | ({"saving"} if saving else set()) or {"start"}

    def said(self) -> str:
        """The end of what it printed."""
        return self.log.read_text()[-4000:]

    def logged(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl, without what depends on the clock."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: x for key, x in row.items() if not key.startswith(VARYING)} for row in rows]

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / f"step-{self.saved_step():06d}"

    def saved_step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        folder = self.folder / "checkpoints"
        steps = [int(one.name[5:]) for one in folder.glob("step-*") if STEP_FOLDER.fullmatch(one.name)]
        return max(steps, default=0)


class Report:
    """What kills have led to."""

    def __init__(self, whole: Job) -> None:
        self.whole = whole
        self.kills: list[str] = []
        self.lost: list[int] = []
        self.ended = 0
        self.differences: list[str] = []
        self.repeated = self.corrupt = 0

    def kill(self, job: Job, phase: str, dice: random.Random) -> None:
        """Start the run, kill it, and note how many whole steps that cost."""
        hit = job.start(phase, dice)
        if hit is None:
            return
        self.kills.append(hit)
        done = max((row["step"] + 1 for row in job.logged() if "optim/steps" in row), default=0)
        self.lost.append(done - job.saved_step())

    def compare(self, job: Job) -> None:
        """Note where a run that has ended differs from the one that was left alone."""
        import torch

        from rlpost.engine import checkpoint_weights

        self.ended += 1
        self.corrupt += job.log.read_text().count("is skipped, and the one before it used")
        if job.logged() != self.whole.logged():
            self.differences.append(f"{job.name}: metrics.jsonl")
        samples = [(one.folder / "samples.jsonl").read_text() for one in (job, self.whole)]
        if samples[0] != samples[1]:
            self.differences.append(f"{job.name}: samples.jsonl")
        mine, alone = (Counter(text.splitlines()) for text in samples)
        self.repeated += (mine - alone).total()
        weights = [checkpoint_weights(one.last) for one in (job, self.whole)]
        odd = [name for name in weights[1] if not torch.equal(weights[0][name], weights[1][name])]
        if odd or weights[0].keys() != weights[1].keys():
            self.differences.append(f"{job.name}: weights {odd[:3]}")
        dice = [file.read_text() for one in (job, self.whole) for file in sorted(one.last.glob("rank-*.json"))]
        if dice[: self.whole.ranks] != dice[self.whole.ranks :]:
            self.differences.append(f"{job.name}: random generators")
        if events(job.folder) != events(self.whole.folder):
            self.differences.append(f"{job.name}: TensorBoard")

    def summary(self) -> dict[str, Any]:
        """All of it."""
        return {
            "kills": len(self.kills),
            "in_phases": dict(Counter(self.kills)),
            "runs": self.ended,
            "lost_steps": dict(Counter(self.lost)),
            "repeated_prompts": self.repeated,
            "corrupt_loads": self.corrupt,
            "differences": self.differences,
        }


def run_marked(mark: Path, command: list[str]) -> int:
    """The command line, with its phases written into a file."""
    handle = os.open(mark, os.O_WRONLY)
    charged = Clock.__call__

    def say(phase: str) -> None:
        os.pwrite(handle, phase.ljust(24).encode(), 0)

    @contextmanager
    def marked(self: Clock, phase: str) -> Iterator[None]:
        with charged(self, phase):
            say(phase)
            try:
                yield
            finally:
                say(self._phases[-2])

    Clock.__call__ = marked  # type: ignore[method-assign]
    return main_of_rlpost(command)


def preload() -> None:
    """What a run imports, so that its processes need not."""
    import deepspeed  # noqa: F401
    import torch.utils.tensorboard
    import transformers

    import rlpost.generate.hf
    import rlpost.train

    assert transformers.LlamaForCausalLM and torch.utils.tensorboard and rlpost.generate.hf and rlpost.train
    torch.set_num_threads(1)


def _ended(pids: list[int]) -> list[tuple[int, int]]:
    found = []
    for pid in pids:
        try:
            found.append(os.waitpid(pid, os.WNOHANG))
        except ChildProcessError:  # it was waited for before
            continue
    return found


def events(folder: Path) -> list[tuple[int, float]]:
    """(step, mean reward) as TensorBoard shows them; none where the run has written nothing for it."""
    if not (folder / "tensorboard").exists():
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(one.step, one.value) for one in accumulator.Scalars("reward/mean")]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
