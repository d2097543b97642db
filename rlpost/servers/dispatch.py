"""One call for rollouts, over the servers that are alive: each rollout is answered exactly once, whoever dies.

A rollout that a server gives up at a weight update goes on from its tokens, under the next weights.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

from rlpost.errors import RunError
from rlpost.servers.fleet import Fleet, poll
from rlpost.servers.replica import Lost, Replica
from rlpost.types import FinishReason, Request, Sampling

TICK_S = 0.2
FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "repetition": "repetition"}


@dataclass
class Unit:
    """One rollout on its way.

    >>> unit = Unit(0, 0, seed=7, max_tokens=4)
    >>> unit.take({"tokens": [5, 6], "logp": [-0.1, -0.2], "finish": "abort", "spans": [[0, 3]]})
    >>> unit.take({"tokens": [1], "logp": [-0.3], "finish": "stop", "spans": [[0, 4]]})
    >>> unit.token_ids, unit.spans, unit.finish
    ([5, 6, 1], [(0, 3), (2, 4)], 'stop')
    """

    request: int
    """Its place among the requests of the call."""
    index: int
    """Its place among the rollouts of its request."""
    seed: int | None
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(first token, version of the weights that wrote it and those after it)"""
    finish: FinishReason | None = None

    def take(self, line: dict[str, Any]) -> None:
        """Add what a server wrote."""
        if len(line["tokens"]) != len(line["logp"]):
            raise Lost(f"{len(line['tokens'])} tokens came with {len(line['logp'])} log-probs")
        for start, version in line["spans"] if line["tokens"] else ():
            place = start + len(self.token_ids)
            if not self.spans or self.spans[-1][1] != version:
                self.spans.append((place, version))
        self.token_ids += line["tokens"]
        self.logp += line["logp"]
        self.finish = FINISH.get(line["finish"])
        if self.finish is None and len(self.token_ids) >= self.max_tokens:
            self.finish = "length"

    def asked(self) -> list[Any]:
        """As the gate wants it: prompt, tokens so far, seed, and how many more."""
        seed = self.seed
        if seed is not None and self.token_ids:  # the dice of what is there have been thrown
            seed = _seed(f"{seed}:{len(self.token_ids)}")
        return [self.request, self.token_ids, seed, self.max_tokens - len(self.token_ids)]


class Stream:
    """What one server was asked for at once, and a thread that reads its answer."""

    def __init__(self, replica: Replica, units: Sequence[Unit]) -> None:
        self.replica = replica
        self.units = dict(enumerate(units))
        """Those that have not ended, by their place in what was asked."""

    def read(self, asked: dict[str, Any], call: Call) -> None:
        """Hand every line to the call's thread, and then how it came to an end."""
        since: float | None = time.monotonic()
        try:
            for line in self.replica.generate(asked):
                if call.over:
                    return
                if "place" in line:
                    call.events.put((self, line))
                since = None if "entered" in line else since
                if since is not None and time.monotonic() - since > call.fleet.start_s:
                    raise Lost(f"{self.replica.url} was not given the newest weights")
            call.events.put((self, None))
        except (Lost, RunError) as error:
            call.events.put((self, error))


class Call:
    """One call of `generate`."""

    def __init__(self, fleet: Fleet, requests: Sequence[Request], sampling: Sampling, *, seeded: bool) -> None:
        self.fleet = fleet
        self.asked = {
            "prompts": [list(request.prompt_ids) for request in requests],
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "stop_token_ids": list(sampling.stop_ids),
                "repeats": sampling.repeats,
                **({"stop": list(sampling.stop), "include_stop_str_in_output": True} if sampling.stop else {}),
            },
        }
        self.requests, self.seeded = requests, seeded
        self.units = [
            Unit(place, i, request.seed + i if seeded else None, request.max_new_tokens(sampling))
            for place, request in enumerate(requests)
            for i in range(request.n)
        ]
        self.resent = 0
        """Rollouts that had to be asked for again, because a server was lost."""
        self.over = False
        self.events: Queue[tuple[Stream, dict[str, Any] | Exception | None]] = Queue()
        self._streams: set[Stream] = set()

    def run(self, whole: Callable[[int], None], version: Callable[[], int]) -> None:
        """Until every rollout has ended; `whole` is told of each request whose last one has."""
        left = [request.n for request in self.requests]
        waiting, until = list(self.units), 0.0
        try:
            while waiting or self._streams:
                poll()
                self.fleet.check_used()
                if waiting and (servers := self.fleet.alive):
                    self._send(waiting, servers, version())
                    waiting, until = [], 0.0
                elif waiting and not self._streams:
                    until = until or time.monotonic() + self.fleet.start_s
                    self.fleet.wait_a_moment(until, f"a server that is alive ({self.fleet.why})")
                for unit in self._hear() if self._streams else ():
                    if unit.finish is None:
                        waiting.append(unit)
                        continue
                    left[unit.request] -= 1
                    if not left[unit.request]:
                        whole(unit.request)
        finally:
            self.over = True

    def _send(self, units: list[Unit], servers: Sequence[Replica], version: int) -> None:
        """Share units out, those of one request together; the same units and servers, the same shares."""
        units.sort(key=lambda unit: (unit.request, unit.index))
        for i, replica in enumerate(servers):
            mine = units[len(units) * i // len(servers) : len(units) * (i + 1) // len(servers)]
            if not mine:
                continue
            seed = (
                None if self.seeded else _seed(f"{self._names()}:{[(one.index, len(one.token_ids)) for one in mine]}")
            )
            asked = self.asked | {"version": version, "seed": seed, "rollouts": [one.asked() for one in mine]}
            stream = Stream(replica, mine)
            self._streams.add(stream)
            threading.Thread(target=stream.read, args=(asked, self), name="rlpost-stream", daemon=True).start()

    def _names(self) -> str:
        return ",".join(f"{request.group}:{request.seed}:{request.n}" for request in self.requests)

    def _hear(self) -> list[Unit]:
        """What has come of some units in the next moment: those that ended, and those to ask for again."""
        try:
            stream, heard = self.events.get(timeout=TICK_S)
        except Empty:
            return []
        if isinstance(heard, dict):
            try:
                unit = stream.units[heard["place"]]
                unit.take(heard)
            except (Lost, LookupError, TypeError) as error:
                heard = Lost(f"{stream.replica.url} answered nonsense ({type(error).__name__}: {error})")
            else:
                return [stream.units.pop(heard["place"])] if unit.finish is not None else []
        if stream not in self._streams:  # given up, and heard of again
            return []
        self._streams.discard(stream)
        again = list(stream.units.values())
        stream.units.clear()
        if isinstance(heard, RunError):
            raise heard
        if isinstance(heard, Lost):
            stream.replica.lose(heard)
            self.resent += len(again)
        return again


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
