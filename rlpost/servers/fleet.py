"""The servers of a run, as one rank sees them: who is alive, who is given weights by this rank, who is asked for what.

Rank r owns the servers i with i mod ranks = r: it gives them weights and takes them in again when they come back. It
asks its own for rollouts, and those of other ranks where it has none alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlpost.errors import RunError
from rlpost.preempt import preemption
from rlpost.servers.replica import Lost, Replica

TICK_S = 1.0
"""How often a server that is lost is looked at."""
TRIES = 3
"""A server whose checksum or canary is wrong so often is no passing failure."""


@dataclass(frozen=True)
class Admission:
    """The newest weights, and how a server that comes back is given them.

    >>> Admission(3, load=None, prove=lambda replica: None).version
    3
    """

    version: int
    load: Callable[[Replica], None] | None
    """None: only all servers together can be given weights, at the next update."""
    prove: Callable[[Replica], None]
    """Raises where the server does not score the canary as the trainer does."""


class Fleet:
    """All servers of a run."""

    def __init__(self, replicas: Sequence[Replica], *, rank: int, size: int, start_s: float, in_flight: str) -> None:
        self.replicas = list(replicas)
        mine = [one for i, one in enumerate(replicas) if i % size == rank]
        self.owned = mine
        self.preferred = mine or [replicas[rank % len(replicas)]]
        self.start_s, self.mode = start_s, {"recompute": "abort"}.get(in_flight, in_flight)
        self.admission: Admission | None = None
        self.error: RunError | None = None
        """What the keeper found and the main thread has to say."""
        self.problem: Callable[[], str | None] = lambda: None
        """Why waiting for a server makes no sense, where that is known."""
        self._wrong: dict[str, int] = {}
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="rlpost-servers", daemon=True)
        self._pool = ThreadPoolExecutor(max(len(mine), 1), thread_name_prefix="rlpost-update")

    @property
    def alive(self) -> list[Replica]:
        """Whom this rank may ask: its own, or where all of them are lost anybody else."""
        return [one for one in self.preferred if one.alive] or [one for one in self.replicas if one.alive]

    @property
    def why(self) -> str:
        """Why those that are lost are."""
        return "; ".join(one.why for one in self.replicas if not one.alive)

    def wait_for_start(self) -> None:
        """Until every server that this rank owns answers, `start_s` at most."""
        until = time.monotonic() + self.start_s
        for replica in self.owned:
            while True:
                try:
                    replica.state(TICK_S)
                    break
                except Lost as error:
                    replica.lose(error)
                self.wait_a_moment(until, f"{replica.url} to start ({replica.why})")
        for replica in self.owned:
            replica.alive = True
        self._keeper.start()

    def check_used(self) -> None:
        """Raise where the run has let go of its servers: a thread that waits for answers has nobody to tell."""
        if self._ended.is_set():
            raise RunError("generator.servers: the run has ended, and its servers are not asked for anything more")

    def wait_a_moment(self, until: float, what: str) -> None:
        """Sleep a little on the way to something that may not come."""
        self.check_used()
        if self.error is not None:
            raise self.error
        if (problem := self.problem()) is not None:
            raise RunError(problem)
        if time.monotonic() > until:
            raise RunError(
                f"generator.servers: waited generator.servers.start_s={self.start_s:g} s in vain for {what}: look into "
                "the servers' logs, or raise it"
            )
        poll()
        time.sleep(0.1)

    def on_owned(self, act: Callable[[Replica], None]) -> None:
        """Do something with each server of this rank that is alive, all at once; one that fails is lost."""

        def guarded(replica: Replica) -> None:
            with replica.lock:
                try:
                    if replica.alive:
                        act(replica)
                except Lost as error:
                    replica.lose(error)

        if self.error is not None:
            raise self.error
        for done in [self._pool.submit(guarded, one) for one in self.owned]:
            done.result()

    def shut(self, replica: Replica) -> None:
        """Shut the gate of a server, however long what is in flight takes."""
        while not replica.close(self.mode):
            if preemption.is_due():
                raise Lost("this rank has been asked to leave")

    def ask_again(self) -> None:
        """Look at all servers that are lost, and take in those that are back."""
        for replica in self.replicas:
            if not replica.alive and self.admission is not None and not self._ended.is_set():
                try:
                    self._take_in(replica, self.admission)
                except Lost as error:
                    replica.why = str(error)

    def _take_in(self, replica: Replica, admission: Admission) -> None:
        state = replica.state(min(5.0, replica.timeout_s))
        if replica not in self.owned:  # its owner gives it weights
            replica.alive = bool(state["open"]) and (state["version"] or 0) >= admission.version
            return
        with replica.lock:
            if admission is not self.admission or admission.load is None:
                return
            try:
                self.shut(replica)
                admission.load(replica)
                admission.prove(replica)
                replica.open(admission.version)
                replica.alive = True
                self._wrong.pop(replica.url, None)
            except Lost as error:
                self._wrong[replica.url] = self._wrong.get(replica.url, 0) + 1
                replica.why = str(error)

    def _keep(self) -> None:
        while not self._ended.wait(TICK_S):
            try:
                self.ask_again()
            except RunError as error:
                self.error = error
                return

    def end(self) -> None:
        """No more looking after servers."""
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join(10)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for replica in self.replicas:
            replica.shut()


def poll() -> None:
    """Leave where this rank was asked to; only the main thread's way is what the watchdog looks at."""
    if threading.current_thread() is threading.main_thread():
        preemption.poll()
    elif preemption.is_due():
        from rlpost.errors import Preempted

        raise Preempted(preemption.message())
