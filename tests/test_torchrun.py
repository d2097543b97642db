"""The end of torchrun as a launcher sees it; the ranks are real processes, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import ROOT

from rlpost.preempt import PREEMPTED

RANK = """
import os, signal, sys, time
folder, first, second = sys.argv[1:]
does = [first, second][int(os.environ["RANK"])]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(f"{folder}/{os.environ['RANK']}", "w").write(str(os.getpid()))
if does.startswith("end"):
    time.sleep(0.3)
    sys.exit(int(does[3:]))
if does == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "deaf":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
time.sleep(120)
"""


def torchrun(folder: Path, first: str, second: str, to_torchrun: str = "", grace_s: int = 60) -> tuple[int, str]:
    """Two ranks that do this, a signal to torchrun when both are there; its exit code and what it says."""
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "rlpost.torchrun", "--standalone", "--nproc-per-node=2", str(script), str(folder)]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RLPOST_GRACE_S": str(grace_s)}
    process = subprocess.Popen(
        [*command, first, second], env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    pids = [folder / "0", folder / "1"]
    try:
        while to_torchrun and not all(pid.exists() and pid.read_text() for pid in pids):
            assert process.poll() is None
            time.sleep(0.1)
        if to_torchrun:
            process.send_signal(getattr(signal, to_torchrun))
        said, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_ends_with_what_its_ranks_ended_with(tmp_path) -> None:
    for i, (first, second, sent, code, told) in enumerate(
        [
            ("end0", "end0", "", 0, ""),
            ("end75", "wait", "", PREEMPTED, ""),
            ("wait", "wait", "SIGUSR1", PREEMPTED, ""),
            ("wait", "wait", "SIGTERM", PREEMPTED, ""),
            ("wait", "deaf", "SIGUSR1", PREEMPTED, "did not leave in time and is killed"),
            ("wait", "end1", "", 1, "torchrun: rank 1 ended with exit code 1"),
            ("wait", "die", "", 1, "torchrun: rank 1 was ended by SIGKILL"),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        ended, said = torchrun(folder, first, second, sent, grace_s=3 if second == "deaf" else 60)
        assert (ended, told in said) == (code, True), said
        for rank in (0, 1):  # nobody is left behind
            with pytest.raises(ProcessLookupError):
                os.kill(int((folder / str(rank)).read_text()), 0)
