"""One generator with continuous batching, as a machine that is asked to be at a time.

A decode step of b answers gives each of them a token. Between two changes of b all answers go equally fast, so the
machine jumps from one change to the next and never walks single steps. Whatever comes from outside takes effect where
the step or prefill that is running ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from rlpost.simulate.rates import Rates

ROUNDING = 1e-9
"""Of a step: so near to its end it has ended."""


class Answer:
    """One answer that is not whole yet."""

    __slots__ = ("entered", "group", "length", "oldest", "since", "version_sum", "written")

    def __init__(self, group: int, length: int) -> None:
        self.group, self.length = group, length
        self.written, self.version_sum, self.oldest = 0, 0, 0
        """Tokens so far, up to the replica's step `since` if it runs; the sum of their versions; the first one's."""
        self.since = 0
        self.entered = 0.0

    def restart(self) -> int:
        """Lose what was written; how much that was."""
        lost = self.written
        self.written, self.version_sum = 0, 0
        return lost


class Pending:
    """One group on its way: what it has, and how much of it is missing."""

    __slots__ = ("due", "id", "missing", "oldest", "size", "version", "version_sum", "written")

    def __init__(self, id: int, version: int, due: float, size: int) -> None:
        self.id, self.version, self.due, self.size = id, version, due, size
        """`version` is that of the weights at which it was given out, `due` the last step that may train it."""
        self.missing = size
        self.written, self.version_sum = 0, 0
        self.oldest: float = math.inf

    def add(self, answer: Answer) -> None:
        """Take in an answer that is whole."""
        self.missing -= 1
        self.written += answer.written
        self.version_sum += answer.version_sum
        self.oldest = min(self.oldest, answer.oldest)


@dataclass(slots=True)
class Work:
    """What a replica has done so far.

    >>> Work().busy_s
    0.0
    """

    busy_s: float = 0.0
    """In which it decoded or read prompts."""
    generated: int = 0
    read: int = 0
    """Tokens of prompts, and of answers that went on."""
    read_again: int = 0
    """Of those: tokens of answers, which it or another replica had written."""
    lost: int = 0
    """Tokens that died with it."""
    resident_s: float = 0.0
    """Seconds x answers in its slots."""
    stay_s: float = 0.0
    """The same, summed over answers when they leave."""
    left: int = 0
    """Times that an answer left."""


class Replica:
    """Answers that run, and those that wait for a slot."""

    def __init__(self, rates: Rates, prompt: int, limit: Callable[[Answer], int]) -> None:
        self.rates, self.prompt = rates, prompt
        self.limit = limit
        """Tokens that an answer may add in its next stay here."""
        self.time, self.steps = 0.0, 0
        """The end of the last decode step, and how many there were."""
        self.running: list[tuple[int, int, Answer]] = []
        """A heap: the step in which an answer stops, a number that keeps the order, the answer."""
        self.waiting: deque[Answer] = deque()
        self.cached: set[int] = set()
        """Groups whose prompt is in the prefix cache."""
        self.version = 0
        self.alive, self.halted, self.admitting = True, True, False
        self.stamp = 0
        """Changes with every plan, so that an event that was planned before can be told."""
        self.work = Work()
        self._entries = 0

    @property
    def outstanding(self) -> int:
        """Answers that it has."""
        return len(self.running) + len(self.waiting)

    @property
    def answers(self) -> list[Answer]:
        """All of them."""
        return [*(answer for _, _, answer in self.running), *self.waiting]

    @property
    def next_time(self) -> float:
        """When an answer stops next, if nothing happens before."""
        if not self.running or self.halted:
            return math.inf
        return self.time + (self.running[0][0] - self.steps) * self.rates.decode_s[len(self.running)]

    def advance(self, until: float) -> list[Answer]:
        """Be at the end of the step or prefill that runs at `until`; the answers that have stopped by then."""
        if not self.running or self.halted:
            seconds = max(0.0, until - self.time)
            self._pass(seconds, busy=False)
            self.time += seconds
            return []
        step_s = self.rates.decode_s[len(self.running)]
        self._decode(min(self.running[0][0] - self.steps, math.ceil((until - self.time) / step_s - ROUNDING)))
        return self._stopped()

    def stop_next(self) -> list[Answer]:
        """Be at `next_time`; the answers that stop there."""
        self._decode(self.running[0][0] - self.steps)
        return self._stopped()

    def admit(self) -> None:
        """Fill free slots, where that is allowed; each answer first has its prompt read, unless the cache has it."""
        while self.admitting and self.waiting and len(self.running) < self.rates.slots:
            answer = self.waiting.popleft()
            answer.since, answer.entered = self.steps, self.time
            if not answer.written:
                answer.oldest = self.version
            self._entries += 1
            heappush(self.running, (self.steps + self.limit(answer), self._entries, answer))
            self._read(answer)

    def update(self, now: float, version: int, *, read_again: bool) -> None:
        """Go on at `now` with other weights: the cache of prompts is empty, answers are read again if so asked."""
        self._pass(now - self.time, busy=False)
        self.time = now
        self.cached.clear()
        self.settle()
        self.version = version
        kept, self.running = sorted(self.running), []
        for _, entry, answer in kept:
            if not answer.written:
                answer.oldest = version
            self.running.append((self.steps + self.limit(answer), entry, answer))
        heapify(self.running)
        for _, _, answer in kept if read_again else ():
            self._read(answer)

    def settle(self) -> None:
        """Write what running answers have so far into them."""
        for _, _, answer in self.running:
            added = self.steps - answer.since
            answer.written += added
            answer.version_sum += added * self.version
            answer.since = self.steps

    def die(self, now: float) -> list[Answer]:
        """Be dead at `now`: what runs is lost, in the middle of a step or not; every answer that it had."""
        if self.running and not self.halted:
            step_s = self.rates.decode_s[len(self.running)]
            whole = math.floor((now - self.time) / step_s + ROUNDING)
            self._decode(min(self.running[0][0] - self.steps, whole))
        if self.running:
            self._pass(now - self.time, busy=not self.halted)
        self.settle()
        lost = [answer for _, _, answer in sorted(self.running)]
        for answer in lost:
            self.work.lost += answer.restart()
            self._leave(answer, now)
        gone = [*lost, *self.waiting]
        self.running, self.alive, self.time = [], False, now
        self.waiting.clear()
        self.cached.clear()
        return gone

    def drop(self, groups: Collection[int]) -> int:
        """Forget the answers of these groups; how many tokens they had."""
        self.settle()
        gone = [answer for _, _, answer in self.running if answer.group in groups]
        for answer in gone:
            self._leave(answer, self.time)
        self.running = [entry for entry in self.running if entry[2].group not in groups]
        heapify(self.running)
        gone += [answer for answer in self.waiting if answer.group in groups]
        self.waiting = deque(answer for answer in self.waiting if answer.group not in groups)
        return sum(answer.written for answer in gone)

    def take(self, answers: Iterable[Answer]) -> None:
        """Let answers wait."""
        self.waiting.extend(answers)

    def _decode(self, steps: int) -> None:
        if steps > 0:
            self.steps += steps
            self.work.generated += steps * len(self.running)
            seconds = steps * self.rates.decode_s[len(self.running)]
            self._pass(seconds, busy=True)
            self.time += seconds

    def _read(self, answer: Answer) -> None:
        read = answer.written + (0 if answer.group in self.cached else self.prompt)
        self.cached.add(answer.group)
        self.work.read += read
        self.work.read_again += answer.written
        seconds = read / self.rates.prefill_rate
        self._pass(seconds, busy=True)
        self.time += seconds

    def _pass(self, seconds: float, *, busy: bool) -> None:
        """Account for time; it may be negative where a replica dies while it reads, which was accounted for whole."""
        self.work.busy_s += seconds if busy else 0.0
        self.work.resident_s += seconds * len(self.running)

    def _stopped(self) -> list[Answer]:
        found = []
        while self.running and self.running[0][0] <= self.steps:
            answer = heappop(self.running)[2]
            added = self.steps - answer.since
            answer.written += added
            answer.version_sum += added * self.version
            self._leave(answer, self.time)
            found.append(answer)
        return found

    def _leave(self, answer: Answer, now: float) -> None:
        self.work.stay_s += now - answer.entered
        self.work.left += 1
