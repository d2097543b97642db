"""A bound on how long a block of this process may take, by the alarm of the system: also for code that never waits."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 0.5
"""An alarm that the block has swallowed comes again."""


class TimeOver(BaseException):
    """No `Exception`, so that the block's own `except Exception` does not take it for one of its own."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise `TimeOver` inside the block after so many seconds; None: never.

    It needs the main thread, and Python that runs now and then: a C function that never returns is not ended by it.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeOver

    handler = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left_s:  # somebody else's alarm, which has gone on running
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.monotonic() - started), 0.01), interval_s)
