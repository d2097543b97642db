"""Rewards on rollouts: every part named, and nothing that failed becomes a zero unless the recipe says so."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from rlpost.cluster_recipe import Failure
from rlpost.errors import RunError
from rlpost.judging import Shape, is_async, judge, source_of
from rlpost.preempt import preemption
from rlpost.types import Group, Rollout, Verdict

if TYPE_CHECKING:
    from rlpost.judges import Judges, Question


@dataclass(frozen=True, slots=True)
class BoundReward:
    """A reward with its recipe parameters filled in."""

    name: str
    weight: float
    call: Callable[..., Any]
    limits: Failure = field(default_factory=Failure)
    """How long it may take for one rollout, and what becomes of a rollout on which it failed."""
    shape: Shape = "rollout"
    plugin: Mapping[str, Any] | None = None
    """What a process apart makes it from; None: it runs in this one."""

    on_hang: str | None = None
    """What becomes of an answer that it took too long for or died of: `ON_HANG` of a shipped reward's file."""

    @property
    def alone(self) -> bool:
        """Whether it judges one rollout at a time, and another process may judge the next one meanwhile."""
        return self.shape == "rollout" and not is_async(self.call)


class Rewards(Sequence[BoundReward]):
    """All rewards of a run, and the processes in which some of them run."""

    def __init__(
        self, each: Iterable[BoundReward], of_groups: Iterable[BoundReward] = (), limits: Failure | None = None
    ) -> None:
        self.each, self.of_groups = tuple(each), tuple(of_groups)
        self._apart = [reward for reward in (*self.each, *self.of_groups) if reward.plugin is not None]
        self._limits = limits or Failure()
        self._judges: Judges | None = None
        self._lock = threading.Lock()
        self._begun: dict[tuple[str, int], tuple[Question, int]] = {}
        """(name, id of the rollout) -> the question that it is part of, and its place there."""

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, index: Any) -> Any:
        return self.each[index]

    @property
    def apart(self) -> bool:
        """Whether some of them run in processes apart."""
        return any(reward.plugin is not None for reward in self.each)

    @property
    def weights(self) -> dict[str, float]:
        """Of every part, those of groups last."""
        return {reward.name: reward.weight for reward in (*self.each, *self.of_groups)}

    @property
    def early(self) -> Callable[[Sequence[Rollout]], None] | None:
        """What is to be told of a group that has been written while others are not; None where nothing runs apart."""
        return self.begin if self.apart else None

    def begin(self, rollouts: Sequence[Rollout]) -> None:
        """Hand rollouts of one group to the processes while others are still being written; `score` waits for them."""
        for reward in self.each:
            if reward.plugin is not None:
                units = [[rollout] for rollout in rollouts] if reward.alone else [list(rollouts)]
                for unit in units:
                    self._ask(reward, unit, None)

    def score(self, groups: Sequence[Group]) -> dict[str, int]:
        """Fill verdicts, parts and `reward` = sum of weight x part; how many rollouts each part could not judge.

        A part that is None leaves the sum; a rollout that no part could judge has reward None, and so has one on which
        a reward failed whose policy is `drop`.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for rollout in rollouts:
            rollout.reward_parts, rollout.verdicts = {}, {}
        for _, unit in itertools.groupby(rollouts, key=attrgetter("group")):
            fresh = [rollout for rollout in unit if not self._has_begun(rollout)]
            if fresh and self.apart:
                self.begin(fresh)
        for reward in self.each:
            for rollout, verdict in zip(rollouts, self._judged(reward, rollouts, None), strict=True):
                _take(reward, rollout, verdict)
        self._forget(rollouts)
        for rollout in rollouts:
            rollout.reward = _sum(rollout, self.weights)
        return {reward.name: sum(one.reward_parts[reward.name] is None for one in rollouts) for reward in self.each}

    def score_groups(self, groups: Sequence[Group]) -> None:
        """Add what the rewards of whole groups give to the rewards of their rollouts."""
        asked = [group for group in groups if group.rollouts]
        for reward in self.of_groups:
            if reward.plugin is not None:
                for group in asked:
                    self._ask(reward, group.rollouts, group)
        for reward, group in itertools.product(self.of_groups, asked):
            for rollout, verdict in zip(group.rollouts, self._judged(reward, group.rollouts, group), strict=True):
                _take(reward, rollout, verdict)
        self._forget([rollout for group in asked for rollout in group.rollouts])
        for group in asked if self.of_groups else ():
            for rollout in group.rollouts:
                rollout.reward = _sum(rollout, self.weights)

    def close(self) -> None:
        """End the processes; rollouts that were begun are forgotten."""
        self._begun.clear()
        if self._judges is not None:
            self._judges.close()

    def _forget(self, rollouts: Iterable[Rollout]) -> None:
        """They are judged; others may have been begun ahead of their step."""
        for reward in self._apart:
            for rollout in rollouts:
                self._begun.pop((reward.name, id(rollout)), None)

    def _has_begun(self, rollout: Rollout) -> bool:
        return any((reward.name, id(rollout)) in self._begun for reward in self.each)

    def _ask(self, reward: BoundReward, rollouts: list[Rollout], group: Group | None) -> None:
        from rlpost.judges import Judges, Question

        question = Question(self._apart.index(reward), rollouts, group, reward.limits.reward_s)
        with self._lock:  # answers may be whole in a thread beside the loop
            if self._judges is None:
                self._judges = Judges([one.plugin for one in self._apart if one.plugin is not None], self._limits)
            self._judges.ask(question)
        for place, rollout in enumerate(rollouts):
            self._begun[reward.name, id(rollout)] = question, place

    def _judged(self, reward: BoundReward, rollouts: list[Rollout], group: Group | None) -> list[Verdict]:
        if reward.plugin is not None:
            return self._answers(reward, rollouts)
        how: dict[str, Any] = {"seconds": reward.limits.reward_s, "poll": preemption.poll}
        if reward.shape != "rollouts":
            return judge(reward.call, reward.shape, rollouts, group=group, **how)
        units = [list(unit) for _, unit in itertools.groupby(rollouts, key=attrgetter("group"))]
        return [verdict for unit in units for verdict in judge(reward.call, reward.shape, unit, **how)]

    def _answers(self, reward: BoundReward, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """What the processes say. Where several were waited for at once and all were lost, each is asked once more."""
        assert self._judges is not None
        found: dict[int, list[Verdict]] = {}
        verdicts = []
        for rollout in rollouts:
            question, place = self._begun[reward.name, id(rollout)]
            if id(question) not in found:
                found[id(question)] = self._judges.answer(question)
            verdict = found[id(question)][place]
            if verdict.failed and reward.shape == "rollout" and len(question.rollouts) > 1 and _lost(verdict):
                self._ask(reward, [rollout], None)
                [verdict] = self._judges.answer(self._begun[reward.name, id(rollout)][0])
            verdicts.append(verdict)
        return verdicts


def score(groups: Sequence[Group], rewards: Sequence[BoundReward]) -> dict[str, int]:
    """As `Rewards.score`."""
    return (rewards if isinstance(rewards, Rewards) else Rewards(rewards)).score(groups)


def _lost(verdict: Verdict) -> bool:
    """Whether a whole process was lost, with the verdicts on other rollouts."""
    return verdict.seconds == 0.0


def _take(reward: BoundReward, rollout: Rollout, verdict: Verdict) -> None:
    """Write a verdict down; where the reward failed and its policy is `raise`, that is the run's end."""
    value = verdict.value
    if verdict.failed:
        policy = reward.limits.reward if verdict.ending == "error" else reward.on_hang or reward.limits.reward
        if policy == "raise":
            raise _failure(reward, rollout, verdict)
        value = 0.0 if policy == "zero" else None
    rollout.verdicts[reward.name], rollout.reward_parts[reward.name] = verdict, value


def _sum(rollout: Rollout, weights: Mapping[str, float]) -> float | None:
    parts = rollout.reward_parts
    if any(verdict.failed and parts[name] is None for name, verdict in rollout.verdicts.items()):
        return None  # without this part the others would look like a worse answer, or a better one
    judged = [weights[name] * part for name, part in parts.items() if part is not None]
    return sum(judged) if judged else None


def _failure(reward: BoundReward, rollout: Rollout, verdict: Verdict) -> RunError:
    more = " raise its timeout_s (failure.reward_s)," if verdict.ending == "timeout" else ""
    source = "" if source_of(reward.call) in verdict.note else f" (in {source_of(reward.call)})"
    return RunError(
        f"reward `{reward.name}` must judge every rollout, and {verdict.note}{source} for task {rollout.task.key}, "
        f"whose completion begins {rollout.text[:80]!r}: mend it,{more} let it return None where it cannot judge, or "
        "set its on_error to drop or zero"
    )
