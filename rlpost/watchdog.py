"""A thread of each rank that says who is stuck where, and ends a process that can no longer end itself.

The ranks meet at the store of `torch.distributed`, over a connection of this thread's own: each keeps its phase there,
and leaves a note when it is asked to leave or fails. So a signal to one rank reaches the others in the middle of their
generation, and a rank that fails ends those that wait for it. Time is monotonic, and no clock is compared with another
machine's: a rank is silent when what it wrote does not change.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError
from rlpost.preempt import PREEMPTED, Preemption, preemption

if TYPE_CHECKING:
    from rlpost.clock import Clock
    from rlpost.recipe import Recipe
    from rlpost.world import World

FAILED = 1
TICK_S = 1.0
GRACE_S = 15.0
"""How long a rank may take to end by itself after another has failed."""
SILENCE_S = 8.0
"""A rank that writes nothing for so long is called silent; a busy one may need a few seconds to be heard."""
STORE_WAIT = timedelta(seconds=30)
GONE = "another rank has ended without a word (killed, or out of memory?): see what torchrun or the kernel says of it"


class Notes:
    """What the ranks write for each other in the store; a rank alone has none."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._store: Any = None
        if world.size > 1:
            from torch.distributed import PrefixStore, TCPStore

            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives the workers
            self._store = PrefixStore(f"rlpost/{attempt}", TCPStore(host, port, is_master=False, timeout=STORE_WAIT))

    def put(self, name: str, text: str) -> None:
        """Write; a store that is gone has nobody left to read it."""
        if self._store is not None:
            try:
                self._store.set(name, text)
            except RuntimeError:
                self._store = None

    def get(self, name: str) -> str | None:
        """What stands there; None where nothing does."""
        if self._store is None:
            return None
        try:
            return self._store.get(name).decode() if self._store.check([name]) else None
        except RuntimeError:
            self._store = None
            return None

    def beats(self) -> list[dict[str, Any] | None]:
        """What each rank last wrote of itself."""
        found = [self.get(f"beat/{rank}") for rank in range(self.size)]
        return [None if text is None else json.loads(text) for text in found]


class Watchdog:
    """Watches the main thread while the block runs."""

    def __init__(self, recipe: Recipe, world: World, clock: Clock, leave: Preemption = preemption) -> None:
        self.limits, self.budget_s = recipe.watchdog, recipe.preempt.budget_s
        self.world, self.clock, self.leave = world, clock, leave
        self.notes = Notes(world)
        self._seen: tuple[float, int] = (leave.passed, clock.changes)
        self._since = time.monotonic()
        self._next_report = self.limits.report_s
        self._parent = os.getppid()
        self._beats = 0
        self._failed_since: float | None = None
        self._told = False
        self._ended = threading.Event()
        self._ears: tuple[socket.socket, socket.socket] | None = None
        self._wakes = -1
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if threading.current_thread() is threading.main_thread():
            self._ears = socket.socketpair()
            for ear in self._ears:
                ear.setblocking(False)
            # A signal is heard here also while the main thread is in a collective and runs no Python.
            self._wakes = signal.set_wakeup_fd(self._ears[1].fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self.limits.stop_s is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._ears is not None:
            signal.set_wakeup_fd(self._wakes)
            for ear in self._ears:
                ear.close()
        if error is None or isinstance(error, SystemExit):
            return
        if lost_a_rank(error) and (first := self._who_failed()) is not None:
            raise RunError(first) from error
        if lost_a_rank(error):
            raise RunError(GONE) from error
        self.notes.put("failed", f"rank {self.world.rank}: {summary(error)}")

    @property
    def idle_s(self) -> float:
        """Seconds since the main thread last got on."""
        return time.monotonic() - self._since

    def _watch(self) -> None:
        while not self._ended.wait(TICK_S):
            self._hear()
            self._say()
            self._follow_the_others()
            self._judge()

    def _hear(self) -> None:
        if self._ears is not None:
            try:
                heard = self._ears[0].recv(64)
            except BlockingIOError:
                heard = b""
            for number in heard:
                if number in (signal.SIGTERM, signal.SIGUSR1):
                    self.leave.hear(number)
        if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
            self.leave.ask("the end of torchrun")
        seen = self.leave.passed, self.clock.changes
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
            self._next_report = self.limits.report_s

    def _say(self) -> None:
        self._beats += 1
        if self.world.size > 1:
            self.notes.put(f"beat/{self.world.rank}", json.dumps({"beat": self._beats} | self._here()))
        if self.limits.stop_s is not None:
            # Of C, and so also heard where a library keeps Python from running at all.
            faulthandler.dump_traceback_later(self.limits.stop_s, exit=True)

    def _follow_the_others(self) -> None:
        if self.leave.is_due() and not self._told:
            self._told = True
            self.notes.put("leave", str(self.leave.why))
        elif not self._told and (why := self.notes.get("leave")) is not None:
            self._told = True
            self.leave.ask(f"{why} on another rank")
        if self._failed_since is None and self.notes.get("failed") is not None:
            self._failed_since = time.monotonic()

    def _judge(self) -> None:
        if self._failed_since is not None and time.monotonic() - self._failed_since > GRACE_S:
            self._end(FAILED, f"{self.notes.get('failed')}: this rank waits for it in vain in phase {self.clock.phase}")
        if self.leave.why is not None and time.monotonic() - self.leave.since > self.budget_s:
            self.notes.put("late", "")
            self._end(
                PREEMPTED,
                f"not able to leave within preempt.budget_s={self.budget_s:g} s (phase {self.clock.phase}): the newest "
                "whole checkpoint is what a later start goes on from",
            )
        if self.idle_s > self._next_report:
            self._next_report *= 2
            self._report()
        if self.limits.stop_s is not None and self.idle_s > self.limits.stop_s:
            self.notes.put("failed", f"rank {self.world.rank}: stuck in phase {self.clock.phase}")
            faulthandler.dump_traceback()
            self._end(FAILED, f"stuck in phase {self.clock.phase} for watchdog.stop_s={self.limits.stop_s:g} s")

    def _report(self) -> None:
        """Print where every rank is; the lowest rank that can speak does."""
        before = self.notes.beats()
        if self.world.size > 1:
            self._ended.wait(SILENCE_S)
            self._say()
        now = self.notes.beats()
        alive = [one is not None and one != was for one, was in zip(now, before, strict=True)]
        alive[self.world.rank] = True
        if alive.index(True) != self.world.rank or self._ended.is_set():
            return
        lines = [f"watchdog: no progress for {self.idle_s:.0f} s"]
        now[self.world.rank] = self._here()
        for rank, one in enumerate(now):
            told = one or {"at": "nowhere yet", "phase": "start", "idle_s": 0}
            silent = "no sign of life (stopped, swapped out or dead); a second before it was in"
            state = f"{told['idle_s']} s in" if alive[rank] else silent
            lines.append(f"  rank {rank} ({told['at']}): {state} phase {told['phase']}")
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _here(self) -> dict[str, Any]:
        """Where this rank is."""
        place = f"{socket.gethostname()}:{os.getpid()}"
        return {"at": place, "phase": self.clock.phase, "idle_s": round(self.idle_s)}

    def _who_failed(self) -> str | None:
        """The rank that failed first, where it could say so; a rank that dies needs a moment to."""
        for _ in range(20):
            if (text := self.notes.get("failed")) is not None:
                return f"this rank has lost the others after a failure of {text}"
            if self.notes.get("late") is not None:
                self._end(PREEMPTED, "another rank was not able to leave in time")
            time.sleep(0.1)
        return None

    def _end(self, code: int, why: str) -> None:
        where = f" (rank {self.world.rank})" if self.world.size > 1 else ""
        print(f"error{where}: {why}", file=sys.stderr, flush=True)
        os._exit(code)


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is what a collective makes of another rank's end."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket closed", "gloo")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def summary(error: BaseException) -> str:
    """An error on one line."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, RunError) else f"{type(error).__name__}: {first}"
