"""Waves of rollouts on their way: begun up to `generator.max_staleness` steps before the step that trains them.

With 0 a wave is begun and awaited within its step, through the same lines. A generator that can answer beside training
(`concurrent`) is asked in a thread, which makes no collectives; any other one writes a wave where it is begun, so that
what staleness does to learning can be seen without servers.

Groups are trained in the order in which they were begun. With `generator.first_come` half of the staleness is room for
overtaking: waves are begun half as far ahead, those groups are trained that are whole first, and none later than the
bound allows; short answers are then trained earlier than long ones (`pipeline/length_bias`). A group that its step
leaves unfinished, as with `generator.partial_tokens`, is held and goes on in the next wave.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import Any

from rlpost.collect import shard
from rlpost.generate.base import Whole
from rlpost.preempt import preemption
from rlpost.saved_groups import group_of, saved
from rlpost.types import Group, Rollout
from rlpost.world import World

POLL_S = 0.2
"""How often somebody who waits for answers looks whether the run has been asked to leave."""


@dataclass(eq=False)
class Wave:
    """This rank's groups that were begun together and are not trained yet.

    >>> from rlpost.types import Task
    >>> Wave(step=4, due=4, groups=[Group(7, Task("a", "1+1="), [])]).size
    1
    """

    step: int
    """The step that trains as many."""
    due: int
    """The last step that may train these."""
    groups: list[Group]
    greedy: dict[int, Group] = field(default_factory=dict)
    """The greedy answer to the task of each group, by its id, where the algorithm asks for one."""
    size: int = -1
    """How many groups it was begun with."""
    work: Future[None] | None = None
    """None: nobody writes it, as after a resume."""

    def __post_init__(self) -> None:
        """As many as there are."""
        self.size = len(self.groups) if self.size < 0 else self.size


Write = Callable[[Wave, Sequence[Group], Whole], None]
"""Answers groups of a wave and tells of the rollouts of each, possibly twice. Those that it leaves unfinished it takes
out of the wave's `groups` and puts into `Pipeline.held`."""


class Pipeline:
    """The groups of this rank from the choice of their tasks until they are trained."""

    def __init__(self, *, ahead: int, first_come: bool, partial: bool, in_threads: bool) -> None:
        self.bound, self.first_come, self.partial = ahead, first_come, partial
        self.ahead = max(1, ahead // 2) if first_come else ahead
        """Steps that waves are begun ahead."""
        self.waves: list[Wave] = []
        self.held: list[Group] = []
        """Groups with answers that are to be continued."""
        self.written: dict[int, tuple[Rollout, ...]] = {}
        """What was generated for each whole group that is not trained yet, in the order in which they were whole."""
        self._changed = Condition()
        self._threads = ThreadPoolExecutor(ahead + 1, "rollouts") if in_threads and ahead else None
        self._before: dict[str, Any] = {}

    @property
    def keeps(self) -> bool:
        """Whether anything is on its way between steps."""
        return self.ahead > 0 or self.partial

    def to_begin(self, step: int, last: int) -> range:
        """The steps whose waves are to be begun now, up to the last step of the run."""
        following = max([step, *(wave.step + 1 for wave in self.waves)])
        return range(following, min(step + self.ahead, last) + 1)

    def wave(self, step: int, now: int, groups: list[Group]) -> Wave:
        """A wave that is begun now, with as many groups as the later `step` trains."""
        return Wave(step, now + self.bound if self.first_come else step, groups)

    def begin_step(self) -> None:
        """Remember what is on its way, in case the step is undone."""
        self._before = {
            "waves": [(wave, list(wave.groups)) for wave in self.waves],
            "held": [(group, list(group.rollouts)) for group in self.held],
            "written": dict(self.written),
        }

    def undo(self) -> None:
        """Go back to the start of the step; waves that were begun in it are forgotten."""
        self.waves = [wave for wave, _ in self._before["waves"]]
        for wave, groups in self._before["waves"]:
            wave.groups = groups
        self.held = [group for group, _ in self._before["held"]]
        for group, rollouts in self._before["held"]:
            group.rollouts = rollouts
        ids = {group.id for wave in self.waves for group in wave.groups}
        self.written = {id: one for id, one in (self._before["written"] | self.written).items() if id in ids}

    def start(self, wave: Wave, write: Write) -> None:
        """Have the groups of a wave written that are not whole: in a thread, or now."""
        if wave not in self.waves:
            self.waves.append(wave)
        wanted = [group for group in wave.groups if group.id not in self.written]

        def work() -> None:
            write(wave, wanted, partial(self._whole, wave))

        if self._threads is None:
            work()
            wave.work = Future()
            wave.work.set_result(None)
        else:
            wave.work = self._threads.submit(work)

    def take(self, step: int) -> tuple[list[Group], list[Group]]:
        """This rank's groups to train in this step, in the order of their ids, and the greedy answers to them.

        Waits for what is due, and where the first come are trained, for as many as the step's own wave was begun with.
        """
        wanted = sum(wave.size for wave in self.waves if wave.step == step)
        due = self._due(step, wanted)
        wanted = max(wanted, len(due)) if self.first_come else len(due)
        self._wait_for(due, wanted)
        ids = [group.id for group in due]
        ids += [id for id in self.written if id not in set(ids)][: wanted - len(due)]
        chosen = {id: self.written.pop(id) for id in sorted(ids)}
        groups = sorted((one for wave in self.waves for one in wave.groups if one.id in chosen), key=lambda one: one.id)
        greedy = [wave.greedy[id] for id in chosen for wave in self.waves if id in wave.greedy]
        for group in groups:
            group.rollouts = list(chosen[group.id])
        for wave in self.waves:
            wave.groups = [group for group in wave.groups if group.id not in chosen]
        self.waves = [wave for wave in self.waves if wave.groups or wave.step > step]
        return groups, greedy

    def _due(self, step: int, a_step: int) -> list[Group]:
        """The groups that must be trained now, oldest first: else some step could not train all that is due in it.

        That is for each later step d what is due until d, less what the steps from the next one to d can train.
        """
        left = sorted((wave.due, group.id, group) for wave in self.waves for group in wave.groups)
        dues = [due for due, _, _ in left]
        must = max((bisect_right(dues, d) - a_step * (d - step) for d in dues), default=0) if self.first_come else 0
        return [group for i, (due, _, group) in enumerate(left) if due <= step or i < must]

    def close(self) -> None:
        """Begin nothing more; the generator ends what it is writing."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _whole(self, wave: Wave, rollouts: Sequence[Rollout]) -> None:
        with self._changed:
            if rollouts and rollouts[0].group in (group.id for group in wave.groups):  # else it is trained already
                self.written.setdefault(rollouts[0].group, tuple(rollouts))
            self._changed.notify_all()

    def _wait_for(self, due: Sequence[Group], wanted: int) -> None:
        while True:
            with self._changed:
                if len(self.written) >= wanted and all(group.id in self.written for group in due):
                    return
                for wave in self.waves:
                    if wave.work is not None and wave.work.done():
                        wave.work.result()  # raises what went wrong there
                self._changed.wait(POLL_S)
            preemption.poll()

    def state_dict(self, world: World) -> dict[str, Any]:
        """What is on its way on every rank; all ranks call it. A group that is not whole is asked for again."""
        if not self.keeps:
            return {}
        with self._changed:
            waves = [
                {
                    "step": wave.step,
                    "due": wave.due,
                    "size": wave.size,
                    "groups": [saved(group, self.written.get(group.id, ())) for group in wave.groups],
                    "greedy": [saved(one, one.rollouts) for one in wave.greedy.values() if one.rollouts],
                }
                for wave in self.waves
            ]
            mine = {"waves": waves, "held": [saved(group, group.rollouts) for group in self.held]}
        return {"ranks": world.all_gather_object(mine)}

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Go on where `state_dict` was taken, with its groups dealt anew where there are other ranks now."""
        ranks = state.get("ranks", [])
        mine = ranks[world.rank] if len(ranks) == world.size else dealt(ranks, world)
        for one in mine["waves"]:
            groups = [group_of(group) for group in one["groups"]]
            self.written |= {group.id: tuple(group.rollouts) for group in groups if group.rollouts}
            greedy = {group.id: group for group in map(group_of, one["greedy"])}
            self.waves.append(Wave(one["step"], one["due"], groups, greedy, one["size"]))
        self.held = [group_of(group) for group in mine["held"]]


def dealt(ranks: Sequence[dict[str, Any]], world: World) -> dict[str, Any]:
    """This rank's share of what other ranks had on their way: of each wave, and of the groups that are held."""

    def share(every: list[Any]) -> list[Any]:
        return [one for _, one in shard(sorted(every, key=lambda one: one["id"]), world.rank, world.size)]

    waves = []
    for i, first in enumerate(ranks[0]["waves"] if ranks else ()):
        groups = share([group for rank in ranks for group in rank["waves"][i]["groups"]])
        ids = {group["id"] for group in groups}
        greedy = [one for rank in ranks for one in rank["waves"][i]["greedy"] if one["id"] in ids]
        size = len(shard(range(sum(rank["waves"][i]["size"] for rank in ranks)), world.rank, world.size))
        waves.append({**first, "size": size, "groups": groups, "greedy": greedy})
    return {"waves": waves, "held": share([group for rank in ranks for group in rank["held"]])}
