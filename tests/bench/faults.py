"""Faults under real runs, one after another: what the run says, what it loses, and whether it ends as one left alone.

    python -m tests.bench.faults [--only NAME ...] [--out runs/faults]

Each run is the command line in a process of its own. Disks are full or read-only because they are mounted so (needs
root); slow disks and clocks that jump come from `preload.c`. Writes `faults.md` and `faults.json`; fails where a run
did not do what is expected of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlpost.manifest import MANIFEST, size_problem
from tests.bench.torture import RECIPE, Job, Report

ROOT = Path(__file__).parent.parent.parent
STEPS = 20
LONGEST_S = 600
FAULTY = '''
import os
import time
from pathlib import Path


def order() -> str:
    file = Path(os.environ["FAULT_ORDER"])
    return file.read_text() if file.exists() else ""


def sevens(rollout) -> float | None:
    """The share of sevens, unless something has been ordered."""
    match order():
        case "raise":
            raise KeyError("no such column")
        case "hang":
            time.sleep(3600)
        case "nothing":
            return None
    time.sleep(0.02)
    return rollout.text.count("7") / len(rollout.token_ids)


def pushed(logp_BT, behavior_logp_BT, adv_BT):
    """Policy gradient, whose gradient is not a number where that has been ordered."""
    return -adv_BT * logp_BT * (float("nan") if order() == "nan" else 1.0), {}
'''


@dataclass
class Seen:
    """What came of a fault."""

    codes: list[int] = field(default_factory=list)
    """Exit codes of the starts."""
    said: str = ""
    lost: int | None = None
    """Whole steps that had been logged and had to be made again."""
    same: bool | None = None
    """Whether the run ended as the one left alone; None: it cannot, or is not compared."""
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.failed.append(what)


class Start:
    """One start of the command line on a run."""

    def __init__(self, job: Job, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.job = job
        self.before = len(job.log.read_text()) if job.log.exists() else 0
        with job.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=log,
                stderr=log,
                cwd=job.out,
                env=os.environ | environment,
                start_new_session=True,
            )

    def until(self, step: int) -> None:
        """Wait until so many steps are logged."""
        self.wait_for(lambda: self.job.done() >= step, f"step {step}")

    def wait_for(self, holds: Any, what: str) -> None:
        """Wait until something holds."""
        until = time.monotonic() + LONGEST_S
        while not holds():
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise AssertionError(f"{what} never came: {self.said()[-3000:]}")
            time.sleep(0.01)

    def end(self, within_s: float = LONGEST_S) -> int:
        """Its exit code; nothing of it is left behind."""
        try:
            return self.process.wait(within_s)
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill what is left of its session."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()

    def said(self) -> str:
        """What this start has printed."""
        return self.job.log.read_text()[self.before :]

    def line(self, *words: str) -> str:
        """The last line that has all these words in it; empty where none has."""
        lines = [line.strip() for line in self.said().splitlines() if all(word in line for word in words)]
        return lines[-1] if lines else ""

    def ranks(self) -> list[int]:
        """Process ids of the ranks under torchrun, in their order."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        placed = {}
        for pid in map(int, found):
            pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            placed |= {int(pair[5:]): pid for pair in pairs if pair.startswith(b"RANK=")}
        return [placed[rank] for rank in sorted(placed)]


class FaultJob(Job):
    """A run, its folder and its log."""

    def done(self) -> int:
        """Steps that are logged."""
        return max((row["step"] + 1 for row in self.logged() if "optim/steps" in row), default=0)

    def whole_step(self) -> int:
        """Of the newest checkpoint that is whole; 0 where there is none."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return max((int(one.name[5:]) for one in folders if is_whole(one)), default=0)


class Lab:
    """A folder with a recipe, the runs that were left alone, and how runs are started in it."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = RECIPE.replace("STEPS", str(STEPS)).replace("tortured:sevens", "faulty:sevens")
        self.recipe = self.out / "faulty.yaml"
        self.recipe.write_text(recipe)
        self.recipe.with_name("faulty.py").write_text(FAULTY)
        self.order = self.out / "order"
        self.preload = self.out / "preload.so"
        self.orders = self.out / "preload.orders"
        self._alone: dict[tuple[int, tuple[str, ...]], FaultJob] = {}

    def job(self, name: str, ranks: int = 1, home: Path | None = None) -> FaultJob:
        """A run by its name, in `home` or in the lab's own folder."""
        where = home or self.out
        where.mkdir(parents=True, exist_ok=True)
        return FaultJob(self.recipe, where, name, ranks)

    def start(self, job: FaultJob, *overrides: str, preload: bool = False) -> Start:
        """Start a run, or go on with it."""
        many = ["rlpost.torchrun", "--standalone", f"--nproc-per-node={job.ranks}", "-m"] if job.ranks > 1 else []
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT_ORDER": str(self.order)}
        if preload:
            places = {"PRELOAD_ORDERS": str(self.orders), "PRELOAD_FOLDER": str(job.folder / "checkpoints")}
            environment |= {"LD_PRELOAD": str(self.preload), **places}
        return Start(job, [*many, "rlpost", *job._command(), *overrides], environment)

    def build_preload(self) -> None:
        """Compile `preload.c`."""
        source = Path(__file__).with_name("preload.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", source, "-o", self.preload, "-ldl"], check=True)

    def go_on(self, job: FaultJob, seen: Seen, *overrides: str, preload: bool = False) -> Start:
        """Start a run again after a fault, to its end, and compare it with one left alone."""
        seen.lost = max(0, job.done() - job.whole_step())
        again = self.start(job, *overrides, preload=preload)
        seen.codes.append(again.end())
        seen.check(seen.codes[-1] == 0, f"goes on to its end: {again.said()[-1500:]}")
        self.compare(job, seen, *overrides)
        return again

    def compare(self, job: FaultJob, seen: Seen, *overrides: str) -> None:
        """Whether it has logged, sampled and learned what the run left alone has."""
        report = Report(self.alone(job.ranks, *overrides))
        report.compare(job)
        seen.same = not report.differences
        seen.check(seen.same, f"differs from the run left alone: {report.differences}")

    def alone(self, ranks: int, *overrides: str) -> FaultJob:
        """The run that nothing happened to."""
        key = (ranks, overrides)
        if key not in self._alone:
            job = self.job(f"alone-{ranks}-{len(self._alone)}", ranks)
            start = self.start(job, *overrides)
            assert start.end() == 0, start.said()[-3000:]
            self._alone[key] = job
        return self._alone[key]


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is what its manifest says."""
    import hashlib

    if size_problem(folder) is not None:
        return False
    files = json.loads((folder / MANIFEST).read_text())["files"]
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    return all(sums[name] == entry["sha256"] for name, entry in files.items())


def main() -> None:
    """Try every fault, print and write the table."""
    from tests.bench.fault_kinds import FAULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[fault.__name__ for fault in FAULTS], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    options = parser.parse_args()
    lab = Lab(options.out)
    lab.build_preload()
    found = {}
    for fault in FAULTS:
        if options.only and fault.__name__ not in options.only:
            continue
        lab.order.unlink(missing_ok=True)
        lab.orders.write_text("0 0")
        started = time.monotonic()
        seen = Seen()
        try:
            fault(lab, seen)
        except Exception:  # whatever a fault leads to is a line of the table
            seen.failed.append(traceback.format_exc())
        found[fault.__name__] = {"what": fault.__doc__, "seconds": time.monotonic() - started, **asdict(seen)}
        print(row(fault.__name__, found[fault.__name__]), *seen.failed, sep="\n", flush=True)
    (lab.out / "faults.json").write_text(json.dumps(found, indent=2) + "\n")
    (lab.out / "faults.md").write_text(table(found))
    if any(one["failed"] for one in found.values()):
        sys.exit("not every run did what is expected of it")


def table(found: dict[str, dict[str, Any]]) -> str:
    """All of it as Markdown."""
    head = ["| fault | exit codes | lost steps | ends as if alone | what was said |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row(name, one) for name, one in found.items())]) + "\n"


def row(name: str, one: dict[str, Any]) -> str:
    """One fault as a line of the table."""
    same = {None: "-", True: "yes", False: "**no**"}[one["same"]]
    codes = ", ".join(map(str, one["codes"]))
    what = " ".join(str(one["what"]).split()).rstrip(".")
    told = "; ".join([f"`{one['said'][:260]}`" if one["said"] else "", *one["notes"]]).strip("; ").replace("|", "/")
    verdict = " **FAILED**" if one["failed"] else ""
    return f"| {what} (`{name}`){verdict} | {codes} | {'-' if one['lost'] is None else one['lost']} | {same} | {told} |"


if __name__ == "__main__":
    main()
