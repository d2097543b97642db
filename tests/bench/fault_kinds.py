"""What is done to runs by `tests.bench.faults`: the docstring of each is its line in the table."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.faults import FaultJob, Lab, Seen

LATE = 8
"""The step at which things happen."""
DAY_S = 86400


def newest(job: FaultJob) -> Path:
    """The newest checkpoint."""
    return job.folder / "checkpoints" / f"step-{job.whole_step():06d}"


def weights_file(job: FaultJob) -> Path:
    """The largest file of the newest checkpoint."""
    return max((file for file in newest(job).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def damaged(lab: Lab, seen: Seen, damage: Callable[[FaultJob], None]) -> None:
    """Kill a run, damage what it has saved, go on."""
    job = lab.job(f"damaged-{damage.__name__}")
    start = lab.start(job)
    start.until(LATE)
    start.stop()
    seen.codes.append(start.process.returncode)
    damage(job)
    again = lab.go_on(job, seen)
    seen.said = again.line("is skipped")
    seen.check("is skipped, and the one before it used" in seen.said, "names what it skips")


def truncated_file(lab: Lab, seen: Seen) -> None:
    """The newest checkpoint has a file that was cut off."""

    def truncate(job: FaultJob) -> None:
        file = weights_file(job)
        os.truncate(file, file.stat().st_size // 2)

    damaged(lab, seen, truncate)


def flipped_bit(lab: Lab, seen: Seen) -> None:
    """The newest checkpoint has a byte with a bit flipped, in the middle of the weights."""

    def flip(job: FaultJob) -> None:
        file = weights_file(job)
        with file.open("r+b") as bytes_of:
            bytes_of.seek(file.stat().st_size // 2)
            [byte] = bytes_of.read(1)
            bytes_of.seek(-1, os.SEEK_CUR)
            bytes_of.write(bytes([byte ^ 4]))

    damaged(lab, seen, flip)


def missing_manifest(lab: Lab, seen: Seen) -> None:
    """The newest checkpoint has no manifest."""
    damaged(lab, seen, lambda job: (newest(job) / "manifest.json").unlink())


def missing_file(lab: Lab, seen: Seen) -> None:
    """The newest checkpoint lacks a file."""
    damaged(lab, seen, lambda job: weights_file(job).unlink())


def all_damaged(lab: Lab, seen: Seen) -> None:
    """Every checkpoint has lost its manifest."""

    def clear(job: FaultJob) -> None:
        for file in (job.folder / "checkpoints").glob("step-*/manifest.json"):
            file.unlink()

    damaged(lab, seen, clear)


@contextmanager
def disk(lab: Lab, name: str, size: str) -> Iterator[Path]:
    """A disk of its own, mounted."""
    place = lab.out / name
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


def full_disk(lab: Lab, seen: Seen) -> None:
    """The disk fills up; room is made before the next start."""
    with disk(lab, "small", "64m") as place:
        job = lab.job("full", home=place)
        start = lab.start(job)
        start.until(LATE)
        ballast = place / "ballast"
        with ballast.open("wb") as file:
            try:
                while file.write(bytes(1 << 16)):
                    file.flush()
            except OSError:
                pass
        seen.codes.append(start.end())
        seen.said = start.line("No space left") or start.line("space")
        seen.check(seen.codes == [1] and bool(seen.said), "ends with 1 and names what is missing")
        ballast.unlink()
        lab.go_on(job, seen)


def read_only(lab: Lab, seen: Seen) -> None:
    """Nothing can be written into the folder of checkpoints any more (chattr +i); mended before the next start."""
    job = lab.job("sealed")
    start = lab.start(job)
    start.until(LATE)
    folder = job.folder / "checkpoints"
    subprocess.run(["chattr", "+i", folder], check=True)
    try:
        seen.codes.append(start.end())
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    seen.said = start.line("error", "not permitted")
    seen.check(
        seen.codes == [1] and bool(seen.said), f"ends with 1 and says what it cannot write: {start.said()[-900:]}"
    )
    lab.go_on(job, seen)


def read_only_start(lab: Lab, seen: Seen) -> None:
    """The folder for runs is read-only from the start."""
    with disk(lab, "sealed", "16m") as place:
        job = lab.job("sealed-start")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        start = lab.start(job, f"run_dir={place}")
        seen.codes.append(start.end())
        seen.said = start.line("must be writable")
        seen.check(seen.codes == [2] and bool(seen.said), "says what must be writable")


def slow_disk(lab: Lab, seen: Seen) -> None:
    """Every write of a checkpoint takes 20 ms and more: saves last longer than steps."""
    lab.orders.write_text("0 20")
    job = lab.job("slow")
    start = lab.start(job, preload=True)
    seen.codes.append(start.end())
    seen.check(seen.codes == [0], f"goes on: {start.said()[-1500:]}")
    lab.compare(job, seen)


def slow_disk_leave(lab: Lab, seen: Seen) -> None:
    """SIGTERM while a slow disk is being written to."""
    lab.orders.write_text("0 20")
    job = lab.job("slow-leave")
    start = lab.start(job, preload=True)
    start.until(LATE)
    start.process.send_signal(signal.SIGTERM)
    seen.codes.append(start.end())
    seen.said = start.line("left")
    seen.check(seen.codes == [75], "leaves with 75")
    lab.orders.write_text("0 0")
    lab.go_on(job, seen)


def slow_disk_budget(lab: Lab, seen: Seen) -> None:
    """SIGTERM, and the disk has become so slow that the save cannot end within preempt.budget_s=3."""
    job = lab.job("slow-budget")
    start = lab.start(job, "preempt.budget_s=3", preload=True)
    start.until(LATE)
    lab.orders.write_text("0 5000")
    start.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    seen.codes.append(start.end())
    seen.notes.append(f"gone after {time.monotonic() - started:.1f} s")
    seen.said = start.line("budget_s")
    seen.check(seen.codes == [75] and bool(seen.said), "leaves with 75 and says that it was cut off")
    lab.orders.write_text("0 0")
    lab.go_on(job, seen)


def clock_forward(lab: Lab, seen: Seen) -> None:
    """The clock jumps a day ahead; preempt.after_s=3000 and watchdog.stop_s=600 are set."""
    jump(lab, seen, DAY_S)


def clock_back(lab: Lab, seen: Seen) -> None:
    """The clock jumps a day back; without TensorBoard, which orders its files by that clock."""
    jump(lab, seen, -DAY_S, "logging.tensorboard=false")


def jump(lab: Lab, seen: Seen, seconds: int, *overrides: str) -> None:
    """Let the clock of a run jump, kill the run later, and go on under the wrong clock."""
    limits = ["preempt.after_s=3000", "watchdog.stop_s=600", *overrides]
    job = lab.job(f"clock{seconds}")
    start = lab.start(job, *limits, preload=True)
    start.until(LATE // 2)
    lab.orders.write_text(f"{seconds} 0")
    start.until(LATE)
    start.stop()
    seen.codes.append(start.process.returncode)
    lab.go_on(job, seen, *limits, preload=True)


def rank_killed(lab: Lab, seen: Seen) -> None:
    """One of two ranks is killed (SIGKILL)."""
    job = lab.job("rank-killed", ranks=2)
    start = lab.start(job)
    start.until(LATE)
    os.kill(start.ranks()[1], signal.SIGKILL)
    started = time.monotonic()
    seen.codes.append(start.end())
    seen.notes.append(f"all gone after {time.monotonic() - started:.1f} s")
    seen.said = start.line("rank 1", "SIGKILL") or start.line("rank 1")
    seen.check(seen.codes == [1] and bool(seen.said), "ends with 1 and names the rank")
    lab.go_on(job, seen)


def rank_stopped(lab: Lab, seen: Seen) -> None:
    """One of two ranks stands still (SIGSTOP) for a minute; watchdog.report_s=10."""
    job = lab.job("rank-stopped", ranks=2)
    start = lab.start(job, "watchdog.report_s=10")
    start.until(LATE)
    os.kill(start.ranks()[1], signal.SIGSTOP)
    time.sleep(60)
    os.kill(start.ranks()[1], signal.SIGCONT)
    seen.codes.append(start.end())
    seen.said = start.line("rank 1", "no sign of life")
    seen.check(seen.codes == [0] and bool(seen.said), "names the rank, and goes on afterwards")
    lab.compare(job, seen, "watchdog.report_s=10")


def signalled(lab: Lab, seen: Seen) -> None:
    """SIGUSR1 to one of two ranks, and SIGTERM to both while they save."""
    job = lab.job("signalled", ranks=2)
    start = lab.start(job)
    start.until(LATE)
    ranks = start.ranks()
    os.kill(ranks[1], signal.SIGUSR1)
    time.sleep(0.05)
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    seen.codes.append(start.end())
    seen.said = start.line("left")
    seen.check(seen.codes == [75], "leaves with 75")
    lab.go_on(job, seen)


def reward_raises(lab: Lab, seen: Seen) -> None:
    """The reward raises; it is mended before the next start."""
    told(lab, seen, "raise", "KeyError", 1)


def reward_hangs(lab: Lab, seen: Seen) -> None:
    """The reward hangs; failure.reward_s=2."""
    told(lab, seen, "hang", "failure.reward_s", 1, "failure.reward_s=2")


def nothing_judged(lab: Lab, seen: Seen) -> None:
    """The reward can judge nothing any more; failure.empty_steps=3."""
    told(lab, seen, "nothing", "failure.empty_steps", 1, "failure.empty_steps=3", same=False)


def gradient_nan(lab: Lab, seen: Seen) -> None:
    """Gradients are not numbers any more; failure.gradients=3."""
    told(lab, seen, "nan", "failure.gradients", 1, "algorithm.loss={use: 'faulty:pushed'}", same=False)


def told(lab: Lab, seen: Seen, order: str, word: str, code: int, *overrides: str, same: bool = True) -> None:
    """Order something of the plug-ins, see the run end, take the order back, and go on."""
    job = lab.job(f"told-{order}")
    start = lab.start(job, *overrides)
    start.until(LATE)
    lab.order.write_text(order)
    seen.codes.append(start.end())
    seen.said = start.line("error", word) or start.line(word)
    seen.check(seen.codes == [code] and bool(seen.said), f"ends with {code} and says {word}: {start.said()[-800:]}")
    lab.order.unlink()
    if same:
        lab.go_on(job, seen, *overrides)
        return
    seen.lost = max(0, job.done() - job.whole_step())
    again = lab.start(job, *overrides)
    seen.codes.append(again.end())
    seen.check(seen.codes[-1] == 0, f"goes on to its end: {again.said()[-1500:]}")


VLLM = ("generator={kind: local_vllm, kv_cache_gib: 0.25, max_num_seqs: 64}", "sampling.max_new_tokens=40")


def vllm_signal(lab: Lab, seen: Seen) -> None:
    """SIGTERM while vLLM generates."""
    job = lab.job("vllm-signal")
    start = lab.start(job, *VLLM)
    start.until(LATE)
    time.sleep(0.03)
    start.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    seen.codes.append(start.end())
    seen.notes.append(f"gone after {time.monotonic() - started:.1f} s")
    seen.said = start.line("left")
    seen.check(seen.codes == [75], "leaves with 75")
    lab.go_on(job, seen, *VLLM)


def vllm_killed(lab: Lab, seen: Seen) -> None:
    """A run with vLLM is killed (SIGKILL)."""
    job = lab.job("vllm-killed")
    start = lab.start(job, *VLLM)
    start.until(LATE)
    start.stop()
    seen.codes.append(start.process.returncode)
    lab.go_on(job, seen, *VLLM)


def moved_folder(lab: Lab, seen: Seen) -> None:
    """The folder of the run is moved elsewhere between two starts."""
    job = lab.job("moved")
    start = lab.start(job)
    start.until(LATE)
    start.stop()
    seen.codes.append(start.process.returncode)
    other = lab.job("moved", home=lab.out / "elsewhere")
    other.folder.parent.mkdir(exist_ok=True)
    shutil.move(job.folder, other.folder)
    lab.go_on(other, seen)


FAULTS: list[Callable[[Lab, Seen], None]] = [
    truncated_file,
    flipped_bit,
    missing_manifest,
    missing_file,
    all_damaged,
    moved_folder,
    full_disk,
    read_only,
    read_only_start,
    slow_disk,
    slow_disk_leave,
    slow_disk_budget,
    clock_forward,
    clock_back,
    rank_killed,
    rank_stopped,
    signalled,
    reward_raises,
    reward_hangs,
    nothing_judged,
    gradient_nan,
    vllm_signal,
    vllm_killed,
]
"""In the order of the table."""
