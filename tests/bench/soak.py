"""Real training while its generator servers are killed, stopped, slowed and restarted at random.

    python -m tests.bench.soak --minutes 60 [--staleness 1] [--replicas 2] [--seed 0] [--out runs/soak]

One run, one command: a rank, and servers that the run starts itself. Afterwards its files are held against what must
hold whatever happens: each group is trained exactly once and whole, its tokens have the log-probs of weights that are
no older than allowed, and no step takes longer than the time limits explain. Writes `soak.md` and `soak.json`, and
fails where something does not hold. A server needs its start-up time, so few accidents fit in a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlpost.preempt import PREEMPTED
from tests.lab import make_lab

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S, START_S = 8.0, 600.0
COIN = '''
import zlib


def coin(rollout) -> float:
    """By chance, so that every step has something to train on and no policy gets good at it."""
    return float(zlib.crc32(str(rollout.token_ids).encode()) % 2)
'''
PROMPTS, GROUP = 8, 8
KINDS = ("kill the server", "kill its engine", "stop it for long", "stop it shortly", "slow it", "end it")
OTHER_WEIGHTS = 1e-3
"""Nats: a token whose log-prob differs so much from the trainer's was not drawn from the weights that it names."""


@dataclass
class Chaos:
    """What is done to the servers, and when."""

    folder: Path
    dice: random.Random
    done: Counter[str] = field(default_factory=Counter)
    stopped: dict[int, float] = field(default_factory=dict)
    """Process groups that are stopped, and when they go on."""

    def servers(self) -> list[dict[str, Any]]:
        """What the supervisor says, where it says something."""
        try:
            return json.loads((self.folder / "servers.json").read_text())["servers"]
        except (OSError, ValueError):
            return []

    def act(self) -> None:
        """One accident of one server that runs."""
        running = [one for one in self.servers() if one["state"] == "running" and one["pid"] not in self.stopped]
        if not running:
            return
        pid, kind = self.dice.choice(running)["pid"], self.dice.choice(KINDS)
        match kind:
            case "kill the server":
                tell(pid, signal.SIGKILL)
            case "kill its engine":
                for child in children(pid):
                    tell(child, signal.SIGKILL)
            case "stop it for long":
                self.stop(pid, self.dice.uniform(1.5, 3.0) * TIMEOUT_S)
            case "stop it shortly":
                self.stop(pid, self.dice.uniform(0.1, 0.6) * TIMEOUT_S)
            case "slow it":
                for _ in range(20):
                    tell_group(pid, signal.SIGSTOP)
                    time.sleep(0.4)
                    tell_group(pid, signal.SIGCONT)
                    time.sleep(0.1)
            case "end it":
                tell(pid, signal.SIGTERM)
        self.done[kind] += 1

    def stop(self, pid: int, seconds: float) -> None:
        tell_group(pid, signal.SIGSTOP)
        self.stopped[pid] = time.monotonic() + seconds

    def go_on(self, *, everybody: bool = False) -> None:
        """Let those go on whose time is over."""
        for pid, until in list(self.stopped.items()):
            if everybody or time.monotonic() > until:
                tell_group(pid, signal.SIGCONT)
                del self.stopped[pid]


def tell(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def tell_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def children(pid: int) -> list[int]:
    try:
        lists = [task.joinpath("children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(child) for text in lists for child in text.split()]


def train(out: Path, options: argparse.Namespace) -> tuple[int, Chaos, float]:
    """One run with accidents; its exit code, what was done, and how long it took."""
    (make_lab(out) / "mylab/coins.py").write_text(COIN)
    asked = [
        *(f"run_dir={out / 'runs'}", "name=soak", "steps=1000000", f"prompts_per_step={PROMPTS}", "save_every=50"),
        *(f"sampling.group_size={GROUP}", "logging.samples_per_step=1000000", "logging.noise_every=0"),
        *(
            "tasks.eval=null",
            "sft=null",
            "sampling.max_new_tokens=48",
            "generator.kind=remote_vllm",
            "generator.seeding=request",
            "engine.lr=1e-4",
            "rewards=[{use: 'mylab.coins:coin', isolate: false}]",
            "algorithm.entropy.coef=0.01",
        ),
        *(f"generator.servers.replicas={options.replicas}", f"generator.servers.timeout_s={TIMEOUT_S}"),
        *(f"generator.servers.start_s={START_S}", "generator.servers.restarts=1000000"),
        *(f"generator.max_staleness={options.staleness}", f"preempt.after_s={60 * options.minutes}"),
        *("logging.tensorboard=false", *options.more),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlpost.torchrun", "--standalone", f"--nproc-per-node={options.ranks}"]
    command += ["-m", "rlpost", "train", str(out / "tiny.yaml"), *asked]
    chaos = Chaos(out / "runs/soak/servers", random.Random(options.seed))
    started = time.monotonic()
    with (out / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=out, env=env, stdout=log, stderr=log)
    metrics = out / "runs/soak/metrics.jsonl"
    due = None
    while run.poll() is None:
        chaos.go_on()
        if due is None and metrics.exists():
            due = time.monotonic()
        if due is not None and time.monotonic() > due:
            chaos.act()
            due = time.monotonic() + chaos.dice.uniform(0.2, 1.8) * options.every_s
        time.sleep(0.1)
    chaos.go_on(everybody=True)
    return run.returncode, chaos, time.monotonic() - started


def verdict(out: Path, code: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Figures of the run, and what does not hold."""
    folder = out / "runs/soak"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    wrong = []
    if code != PREEMPTED:
        wrong.append(f"the run must end with {PREEMPTED} when its time is over (got {code})")
    if [line["step"] for line in lines] != list(range(len(lines))):
        wrong.append("each step must be logged once, in order")
    wrong += groups_wrong(rows, len(lines), options.ranks)
    gaps = [b["unix_s"] - a["unix_s"] for a, b in pairwise(lines)]
    starts = [one["starts"] for one in Chaos(folder / "servers", random.Random()).servers()]
    bound = 2 * TIMEOUT_S + START_S
    if max(gaps, default=0.0) > bound:
        wrong.append(f"no step may take longer than {bound:g} s (got {max(gaps):.0f})")
    differs = max((line.get("canary/logp_diff_max", 0.0) for line in lines), default=0.0)
    if differs > OTHER_WEIGHTS:
        wrong.append(f"the canary must differ by less than {OTHER_WEIGHTS:g} (got {differs:.2g})")
    furthest = max((row["tokens"]["logp_diff"]["max"] or 0.0 for row in rows), default=0.0)
    if furthest > OTHER_WEIGHTS and not options.staleness:
        wrong.append(f"tokens must be drawn from the weights of their step (their log-probs differ by {furthest:.2g})")
    stale = max((line.get("pipeline/age_max", 0.0) for line in lines), default=0.0)
    if stale > options.staleness:
        wrong.append(f"no rollout may be staler than {options.staleness} steps (got {stale:g})")
    wrong += processes_wrong(folder)
    gaps.sort()
    updates = [line["servers/update_s"] for line in lines if "servers/update_s" in line]
    found = {
        "steps": len(lines),
        "weight updates": len({line["optim/steps"] for line in lines}),
        "groups": len({row["group"] for row in rows}),
        "rollouts": sum(line["rollouts/num"] for line in lines),
        "asked again of another server": sum(line.get("servers/resent", 0) for line in lines),
        "steps with a server missing": sum(line.get("servers/alive", 0) < options.replicas for line in lines),
        "starts of each server": starts,
        "median s between steps": round(gaps[len(gaps) // 2], 2) if gaps else None,
        "longest s between steps": round(gaps[-1], 1) if gaps else None,
        "its bound": bound,
        "median s of a weight update": round(sorted(updates)[len(updates) // 2], 3),
        "largest canary difference, nats": differs,
        "largest difference of a token's log-prob, nats": furthest,
        "oldest group when it was trained, steps": stale,
    }
    return found, wrong


def groups_wrong(rows: list[dict[str, Any]], steps: int, ranks: int) -> list[str]:
    """Every group once, in one step, whole; the main rank writes those that it trains."""
    wrong = []
    seen: dict[int, Counter[int]] = {}
    for row in rows:
        seen.setdefault(row["group"], Counter())[row["step"]] += 1
    twice = [group for group, at in seen.items() if len(at) > 1]
    broken = [group for group, at in seen.items() if set(at.values()) != {GROUP}]
    if twice:
        wrong.append(f"groups {twice[:5]} were trained in more than one step")
    if broken:
        wrong.append(f"groups {broken[:5]} were not trained with {GROUP} rollouts")
    if ranks == 1 and sorted(seen) != list(range(steps * PROMPTS)):
        wrong.append(f"{steps} steps must train groups 0 to {steps * PROMPTS - 1} (got {len(seen)} groups)")
    return wrong


def processes_wrong(folder: Path) -> list[str]:
    """Nothing may be left of the servers."""
    pids = {one["pid"] for one in Chaos(folder / "servers", random.Random()).servers()}
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) in pids and fields[0] != "Z":
            left.append(int(stat.parent.name))
    files = [path.name for path in Path("/dev/shm").glob("*rlpost-weights-*") if path.stat().st_uid == os.getuid()]
    return [f"processes {left} are left"] * bool(left) + [f"files {files} are left in /dev/shm"] * bool(files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every-s", type=float, default=30.0, help="between accidents, on average")
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("more", nargs="*", metavar="key=value", help="further overrides of the recipe")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True)
    code, chaos, took = train(out, options)
    found, wrong = verdict(out, code, options)
    found = {"minutes": round(took / 60, 1), "accidents": dict(chaos.done)} | found
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in found.items())]
    table.append(f"| what does not hold | {'; '.join(wrong) or 'nothing'} |")
    (out / "soak.md").write_text("\n".join(table) + "\n")
    (out / "soak.json").write_text(json.dumps(found | {"wrong": wrong}, indent=1))
    print("\n".join(table))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
