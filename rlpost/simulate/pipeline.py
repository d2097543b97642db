"""Generation, training, weight sync, staleness and failures of a described cluster, event by event.

Step s: the weights of version s go to all replicas, which pause for it; the prompts of step s + k are given out; the
trainer waits for the groups of step s, and trains. Replicas generate meanwhile, unless they are the same GPUs. Rewards
and the choice of groups take no time of their own (`train.fixed_s` has it), groups are whole or not trained at all,
and a replica is as fast as its table says: no interference, no network, no preemption for want of cache.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, fields
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

from rlpost.simulate.cluster import Cluster
from rlpost.simulate.rates import draw, rates
from rlpost.simulate.replica import Answer, Pending, Replica, Work

NEXT, DEATH, BIRTH = 0, 1, 2
"""Kinds of events: an answer stops, a replica dies, one is there again."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When things happened in one step, and what was trained.

    >>> StepTimes(0, 1, 5, 5, 9, tokens=60, stale_sum=30, oldest=1, busy_s=5.0).train_s
    4
    """

    begin: float
    synced: float
    """The weights have arrived."""
    ready: float
    """The groups to train are whole."""
    begun: float
    """The trainer begins: later than that only where it waits for its GPUs to stop generating."""
    end: float
    tokens: int
    """Of the groups' answers."""
    stale_sum: int
    """Over them: optimizer steps between the weights that wrote a token and those that are trained on it."""
    oldest: int
    """The largest."""
    busy_s: float
    """Replica-seconds of work, from begin to end."""

    @property
    def train_s(self) -> float:
        """Seconds of training."""
        return self.end - self.begun

    @property
    def stale_mean(self) -> float:
        """Staleness of a token."""
        whole = max(1, self.tokens)
        return self.stale_sum / whole


@dataclass(frozen=True, slots=True)
class Result:
    """A simulation that has ended."""

    cluster: Cluster
    steps: list[StepTimes]
    work: Work
    """Of all replicas together."""
    trained: list[int]
    """Ids of groups in the order in which they were trained; they are numbered as they were given out."""
    drawn_tokens: int
    """Of the groups that were given out for these steps, whether they were trained or not."""
    drawn_groups: int
    dropped_tokens: int
    dropped_groups: int
    open_tokens: int
    """Of what was on its way when the last step ended."""
    deaths: int
    slots: int
    """Of a replica."""


class Pipeline:
    """A cluster at work."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.rates = cluster, rates(cluster)
        prompt = cluster.lengths.prompt
        self.replicas = [Replica(self.rates, prompt, self._limit) for _ in range(cluster.num_replicas)]
        self.step, self.next_wave, self.next_id = 0, 0, 0
        self.groups: dict[int, Pending] = {}
        """Given out and not trained."""
        self.whole: list[Pending] = []
        """Of those: complete, in the order in which they became so."""
        self.open_of: Counter[float] = Counter()
        """Groups that are not complete, by the step in which they are due."""
        self.parked: list[Answer] = []
        """Answers that have added all that they may before the next update."""
        self.homeless: list[Answer] = []
        """Answers that no replica lives for."""
        self.active = 0
        """Answers on replicas."""
        self.lengths, self.spare, self.fate = (np.random.default_rng([cluster.seed, i]) for i in range(3))
        self.events: list[tuple[float, int, int, int, int]] = []
        """A heap: time, a number that keeps the order, kind, replica, its stamp."""
        self.num_events, self.deaths = 0, 0
        self.trained: list[int] = []
        self.drawn_groups, self.drawn_tokens, self.dropped_tokens, self.dropped_groups = 0, 0, 0, 0
        self.halted, self.draining = True, False
        self.latest = 0.0
        """When the last answer became whole."""
        for index in range(len(self.replicas)):
            self._plan_death(0.0, index)

    def run(self) -> Result:
        """All steps."""
        now, steps = 0.0, []
        for step in range(self.cluster.steps):
            self.step = step
            begin, busy_s = now, self._work().busy_s
            if not self.halted:
                now = self._halt(now)
            synced = now + self.rates.sync_s
            self._pass(synced)
            self._give_out()
            self._resume(synced)
            ready = begun = self._wait(synced)
            if self.cluster.placement == "colocated":
                begun = self._halt(ready)
            groups = self._choose()
            now = begun + self._train_s(groups)
            self._pass(now)
            trained = self._train(groups)
            steps.append(StepTimes(begin, synced, ready, begun, now, *trained, self._work().busy_s - busy_s))
        return self._result(steps)

    # What the trainer does.

    def _give_out(self) -> None:
        """The waves that may be on their way in this step; groups that would be too stale are replaced."""
        cluster, answers = self.cluster, sorted(self.parked, key=lambda answer: answer.group)
        self.parked = []
        slack = cluster.max_staleness - cluster.waves_ahead if cluster.first_come else 0
        if cluster.late == "drop":
            answers = self._without_late(answers)
        while self.next_wave <= self.step + cluster.waves_ahead:
            held = 0 if cluster.partial_tokens is None else len(self.groups)
            lengths_PG = draw(cluster.lengths, cluster.prompts_per_step - held, cluster.group_size, self.lengths)
            if self.next_wave < cluster.steps:
                self.drawn_tokens += int(lengths_PG.sum())
                self.drawn_groups += len(lengths_PG)
            answers += self._new(lengths_PG, math.inf if cluster.late == "drop" else self.next_wave + slack)
            self.next_wave += 1
        self._dispatch(answers)

    def _new(self, lengths_PG: NDArray[np.int64], due: float) -> list[Answer]:
        answers = []
        for lengths_G in lengths_PG.tolist():
            self.groups[self.next_id] = Pending(self.next_id, self.step, due, len(lengths_G))
            self.open_of[due] += 1
            answers += [Answer(self.next_id, length) for length in lengths_G]
            self.next_id += 1
        return answers

    def _without_late(self, answers: list[Answer]) -> list[Answer]:
        """Throw away what would be more than k steps stale, whole or not, and give out as many new groups."""
        cluster = self.cluster
        late = {group.id for group in self.groups.values() if group.version < self.step - cluster.max_staleness}
        if not late:
            return answers
        for replica in self.replicas:
            before = replica.outstanding
            self.dropped_tokens += replica.drop(late)
            self.active -= before - replica.outstanding
        self.dropped_tokens += sum(answer.written for answer in answers if answer.group in late)
        self.dropped_tokens += sum(self.groups.pop(id).written for id in late)
        self.dropped_groups += len(late)
        self.whole = [group for group in self.whole if group.id not in late]
        self.homeless = [answer for answer in self.homeless if answer.group not in late]
        kept = [answer for answer in answers if answer.group not in late]
        return kept + self._new(draw(cluster.lengths, len(late), cluster.group_size, self.spare), math.inf)

    def _wait(self, now: float) -> float:
        """Until there is enough to train."""
        while not self._is_ready():
            now = max(now, self._event()[0])
        return max(now, self.latest)

    def _is_ready(self) -> bool:
        if self.cluster.partial_tokens is not None:
            return not self.active and not self.homeless
        return not self.open_of[self.step] and len(self.whole) >= self.cluster.prompts_per_step

    def _choose(self) -> list[Pending]:
        """The groups of this step: those that are due, then those that were whole first."""
        first = sorted(self.whole, key=lambda group: group.due > self.step)
        return first[: self.cluster.prompts_per_step]

    def _train_s(self, groups: list[Pending]) -> float:
        prompts = sum(group.size for group in groups) * self.cluster.lengths.prompt
        processed = (prompts + sum(group.written for group in groups)) * self.cluster.train.kept_frac
        return self.cluster.train.fixed_s + processed / self.rates.train_rate

    def _train(self, groups: list[Pending]) -> tuple[int, int, int]:
        """Tokens, their staleness in all, and the largest."""
        ids = [group.id for group in groups]
        self.trained += ids
        for id in ids:
            del self.groups[id]
        gone = set(ids)
        self.whole = [group for group in self.whole if group.id not in gone]
        tokens = sum(group.written for group in groups)
        stale = self.step * tokens - sum(group.version_sum for group in groups)
        return tokens, stale, self.step - int(min((group.oldest for group in groups), default=self.step))

    # What happens to replicas.

    def _limit(self, answer: Answer) -> int:
        left, part = answer.length - answer.written, self.cluster.partial_tokens
        return left if part is None else min(left, part)

    def _halt(self, now: float) -> float:
        """Stop all replicas; when the last of them has stopped."""
        if self.cluster.in_flight == "wait":
            now = self._drain(now)
        stopped = now
        for replica in self._living():
            self._done(replica, replica.advance(now))
            replica.halted, replica.admitting = True, False
            replica.stamp += 1
            stopped = max(stopped, replica.time)
        self.halted = True
        return stopped

    def _drain(self, now: float) -> float:
        """Let every answer that runs end, and none begin."""
        self.draining = True
        for replica in self._living():
            replica.admitting = False
        busy = {index for index, replica in enumerate(self.replicas) if replica.running}
        while busy:
            at, index = self._event()
            now = max(now, at)
            if not self.replicas[index].running:
                busy.discard(index)
        self.draining = False
        return now

    def _resume(self, now: float) -> None:
        """All replicas go on with the weights of this step."""
        self.halted = False
        for index, replica in enumerate(self.replicas):
            if replica.alive:
                replica.halted, replica.admitting = False, True
                replica.update(now, self.step, read_again=self.cluster.in_flight == "recompute")
                self._admit(index)

    def _dispatch(self, answers: list[Answer]) -> set[int]:
        """Hand answers to the replicas that have least, and which those are."""
        load = [(replica.outstanding, index) for index, replica in enumerate(self.replicas) if replica.alive]
        if not load:
            self.homeless += answers
            return set()
        heapify(load)
        touched = set()
        self.active += len(answers)
        alone = itertools.count()
        for _, chunk in itertools.groupby(answers, lambda one: one.group if self.rates.whole_groups else next(alone)):
            taken = list(chunk)
            outstanding, index = load[0]
            self.replicas[index].take(taken)
            touched.add(index)
            heapreplace(load, (outstanding + len(taken), index))
        return touched

    def _wake(self, index: int, now: float) -> None:
        """Have a replica see what was handed to it while it ran."""
        replica = self.replicas[index]
        if not replica.halted:
            self._done(replica, replica.advance(now))
            self._admit(index)

    def _admit(self, index: int) -> None:
        replica = self.replicas[index]
        replica.admit()
        replica.stamp += 1
        if replica.running:
            self._plan(replica.next_time, NEXT, index, replica.stamp)

    def _done(self, replica: Replica, answers: list[Answer]) -> None:
        """Answers that have left a replica: whole, or at the end of what they may add."""
        self.active -= len(answers)
        for answer in answers:
            if answer.written < answer.length:
                self.parked.append(answer)
                continue
            group = self.groups[answer.group]
            group.add(answer)
            if not group.missing:
                self.open_of[group.due] -= 1
                self.whole.append(group)
                self.latest = replica.time

    # Events.

    def _plan(self, time: float, kind: int, index: int, stamp: int) -> None:
        self.num_events += 1
        heappush(self.events, (time, self.num_events, kind, index, stamp))

    def _plan_death(self, now: float, index: int) -> None:
        hours = self.cluster.failures.mtbf_h
        if hours is not None:
            lives = self.fate.exponential(3600 * hours / self.cluster.replicas.tensor_parallel)
            self._plan(now + lives, DEATH, index, 0)

    def _pass(self, until: float) -> None:
        """What happens up to a time."""
        while self.events and self.events[0][0] <= until:
            self._event()

    def _event(self) -> tuple[float, int]:
        """The next thing that happens: when, and to which replica."""
        time, _, kind, index, stamp = heappop(self.events)
        replica = self.replicas[index]
        if kind == DEATH:
            self._die(time, index)
        elif kind == BIRTH:
            self._return(time, index)
        elif stamp == replica.stamp:
            self._done(replica, replica.stop_next())
            self._admit(index)
        else:  # it was planned before something else happened
            time = -math.inf
        return time, index

    def _die(self, now: float, index: int) -> None:
        replica = self.replicas[index]
        self.deaths += 1
        gone = replica.die(now)
        replica.stamp += 1
        self.active -= len(gone)
        self._plan(now + self.cluster.failures.restart_s, BIRTH, index, 0)
        for other in self._dispatch(gone):
            self._wake(other, now)

    def _return(self, now: float, index: int) -> None:
        replica = self.replicas[index]
        replica.alive, replica.time, replica.version = True, now, self.step
        replica.halted, replica.admitting = self.halted, not self.halted and not self.draining
        self._plan_death(now, index)
        homeless, self.homeless = self.homeless, []
        for other in self._dispatch(homeless):
            self._wake(other, now)

    def _living(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.alive]

    # What came of it.

    def _work(self) -> Work:
        names = [one.name for one in fields(Work)]
        return Work(*(sum(getattr(replica.work, name) for replica in self.replicas) for name in names))

    def _result(self, steps: list[StepTimes]) -> Result:
        for replica in self.replicas:
            replica.settle()
        unfinished = [answer for replica in self.replicas for answer in replica.answers] + self.parked + self.homeless
        on_its_way = sum(group.written for group in self.groups.values()) + sum(one.written for one in unfinished)
        return Result(
            cluster=self.cluster,
            steps=steps,
            work=self._work(),
            trained=self.trained,
            drawn_tokens=self.drawn_tokens,
            drawn_groups=self.drawn_groups,
            dropped_tokens=self.dropped_tokens,
            dropped_groups=self.dropped_groups,
            open_tokens=on_its_way,
            deaths=self.deaths,
            slots=self.rates.slots,
        )
