"""`python -m rlpost.torchrun ...`: torchrun, with an end that a launcher can act on.

torchrun alone ends with 1 whatever its ranks ended with, gives them 30 s after SIGTERM, and dies of SIGUSR1 while they
go on. Here both signals reach the ranks, which have as long as they need (RLPOST_GRACE_S at most), and the exit code is
theirs: PREEMPTED where all of them left because they were asked to. Arguments are torchrun's own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from rlpost.preempt import PREEMPTED, SIGNALS

FAILED = 1
GRACE_S = 600.0
TORCHRUN_HEARS = "SIGINT,SIGHUP,SIGQUIT"
"""What torchrun still handles by itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments, and return what its ranks have come to."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    given = list(sys.argv[1:] if arguments is None else arguments)
    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        torchrun([f"--signals-to-handle={TORCHRUN_HEARS}", *given])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if have_left(codes.values()):
            return PREEMPTED
        for rank, code in sorted(codes.items()):
            print(f"torchrun: rank {rank} {said_of(code)}", file=sys.stderr, flush=True)
        return FAILED
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """A signal handler: hand the signal to the ranks, wait for their end, and end with what they ended with."""
    ranks = children()
    for pid in ranks:
        tell(pid, number)
    until = time.monotonic() + float(os.environ.get("RLPOST_GRACE_S", GRACE_S))
    codes = {pid: code for pid in ranks if (code := wait_for(pid, until)) is not None}
    for pid in ranks:
        if pid not in codes:
            print(f"torchrun: process {pid} did not leave in time and is killed", file=sys.stderr, flush=True)
            tell(pid, signal.SIGKILL)
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    # A rank that had to be killed leaves a whole checkpoint behind, and the others wanted to be started again.
    raise SystemExit(PREEMPTED if have_left(codes.values()) or not codes else FAILED)


def children() -> list[int]:
    """The processes that this one has started and not yet reaped."""
    lists = (task.joinpath("children").read_text() for task in Path("/proc/self/task").iterdir())
    return [int(pid) for pids in lists for pid in pids.split()]


def tell(pid: int, number: int) -> None:
    """Send a signal to a rank, which may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_for(pid: int, until: float) -> int | None:
    """How a child ended, negative where a signal did it; None where it has not by then. torchrun reaps it later."""
    while time.monotonic() < until:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        time.sleep(0.05)
    return None


def have_left(codes: Iterable[int]) -> bool:
    """Whether ranks left because they were asked to: torchrun ends by SIGTERM those that are a moment slower.

    >>> have_left([75, 75]), have_left([75, -15]), have_left([75, 1]), have_left([75, -9]), have_left([-15])
    (True, True, False, False, False)
    """
    found = set(codes)
    return PREEMPTED in found and found <= {PREEMPTED, -signal.SIGTERM}


def said_of(code: int) -> str:
    """How a rank ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}; what it said stands above"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


if __name__ == "__main__":
    sys.exit(main())
