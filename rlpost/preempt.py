"""Asked to leave: SIGTERM, SIGUSR1 or a time limit set a flag that every long loop looks at.

A rank that runs a loop alone calls `poll` inside `World.together`; ranks that run one in step call `agree`. Either way
all of them leave at the same place, save what is whole, and end with the exit code PREEMPTED.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from rlpost.errors import Preempted

PREEMPTED = 75
"""Exit code of a run that was asked to leave and wants to be started again: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Ranks(Protocol):
    """What agreeing needs of the ranks."""

    def max(self, value: int) -> int:
        """The largest of an integer over all ranks."""


class Preemption:
    """Whether this process has been asked to leave; and when it last came past a `poll`, for the watchdog.

    Time is `time.monotonic`: a clock that jumps ends nothing.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.reset()

    def reset(self) -> None:
        """As in a new process."""
        self.why: str | None = None
        """Who asked; None: nobody."""
        self.since = math.inf
        """When that was."""
        self.passed = self._now()
        """When the main thread last said that it gets on."""
        self._limit = math.inf

    def ask(self, why: str) -> None:
        """Ask to leave; only the first to ask is remembered, so a second signal changes nothing."""
        if self.why is None:
            self.why, self.since = why, self._now()

    def limit(self, seconds: float | None) -> None:
        """Ask by itself after so many seconds from now; None: never."""
        self._limit = math.inf if seconds is None else self._now() + seconds

    def is_due(self) -> bool:
        """Whether somebody has asked, or the time is over."""
        if self._now() >= self._limit:
            self.ask("the time limit (preempt.after_s)")
        return self.why is not None

    def get_on(self) -> None:
        """Say that the main thread gets on."""
        self.passed = self._now()

    def poll(self) -> None:
        """Leave this rank's own loop if it has been asked to; call it inside `World.together`."""
        self.get_on()
        if self.is_due():
            raise Preempted(self.message())

    def agree(self, ranks: Ranks) -> bool:
        """Whether any rank has been asked; every rank calls it."""
        self.get_on()
        return bool(ranks.max(int(self.is_due())))

    def check(self, ranks: Ranks) -> None:
        """Leave on all ranks if any has been asked; every rank calls it."""
        if self.agree(ranks):
            raise Preempted(self.message())

    def message(self) -> str:
        """What the main rank says when it leaves."""
        return f"asked to leave by {self.why or 'another rank'}"

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler: only the flag is set, so a signal in the middle of a save does not touch it."""
        self.ask(signal.Signals(number).name)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGNALS instead of ending by them. After a leave they are ignored: the process is on its way out."""
        before = {number: signal.signal(number, self.hear) for number in SIGNALS}
        try:
            yield
        finally:
            left = self.why is not None
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if left else handler)


preemption = Preemption()
"""This process's: signals are sent to a process, so there is one."""
