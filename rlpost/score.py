"""Rewards on rollouts: every part named, and nothing that failed ever becomes a zero."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

from rlpost.cluster_recipe import Failure
from rlpost.deadline import TimeOver, deadline
from rlpost.errors import RecipeError, RunError
from rlpost.metrics import METRICS
from rlpost.plugins import bind
from rlpost.preempt import preemption
from rlpost.types import Group, Rollout

POLL_S = 0.5
"""How often a rank that waits for async rewards looks whether it has been asked to leave."""


@dataclass(frozen=True, slots=True)
class BoundReward:
    """A reward with its recipe parameters filled in; `call` is a plain or an async function of one rollout."""

    name: str
    weight: float
    call: Callable[[Rollout], Any]
    limits: Failure = field(default_factory=Failure)
    """How long it may take, and what becomes of a rollout for which it took longer."""


def bind_rewards(rewards: Sequence[Mapping[str, Any]], limits: Failure | None = None) -> list[BoundReward]:
    """The recipe's rewards, each under its own part name: the second `brevity` is `brevity_2`."""
    bound: list[BoundReward] = []
    # A part is logged as reward/<name>, beside figures that have taken some names already.
    taken = {metric.removeprefix("reward/") for metric in METRICS if metric.startswith("reward/")}
    for index, plugin in enumerate(rewards):
        where = f"rewards.{index}"
        call = bind(plugin, "rewards", where=where, skip=1)
        weight = plugin.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise RecipeError([f"{where}.weight must be a finite number (got {weight!r})"])
        stem = plugin["use"].rpartition(":")[2]
        name = stem
        count = 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        bound.append(BoundReward(name, float(weight), call, limits or Failure()))
    return bound


def score(groups: Sequence[Group], rewards: Sequence[BoundReward]) -> dict[str, int]:
    """Fill `reward_parts` and `reward` = sum of weight x part, and count what each part could not judge.

    A part that is None leaves the sum; a rollout that no part could judge has reward None.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        rollout.reward_parts = {}
    for reward in rewards:
        for rollout, value in zip(rollouts, _judge(reward, rollouts), strict=True):
            rollout.reward_parts[reward.name] = _number(reward, rollout, value)
    weights = {reward.name: reward.weight for reward in rewards}
    for rollout in rollouts:
        judged = [weights[name] * part for name, part in rollout.reward_parts.items() if part is not None]
        rollout.reward = sum(judged) if judged else None
    return {name: sum(rollout.reward_parts[name] is None for rollout in rollouts) for name in weights}


def _judge(reward: BoundReward, rollouts: list[Rollout]) -> list[Any]:
    """What the reward returns for each rollout; an async reward waits for all of them at once."""
    values = []
    for rollout in rollouts:
        preemption.poll()
        try:
            with deadline(reward.limits.reward_s):
                values.append(reward.call(rollout))
        except TimeOver as error:
            _unless_left_out(reward, rollout, error)
            values.append(None)
        except Exception as error:  # a user's code may raise anything; it is only given context here
            raise _failure(reward, rollout, error) from error
    if any(inspect.isawaitable(value) for value in values):
        return asyncio.run(_await_all(reward, rollouts, values))
    return values


async def _await_all(reward: BoundReward, rollouts: list[Rollout], values: list[Any]) -> list[Any]:
    async def judge(rollout: Rollout, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        try:
            async with asyncio.timeout(reward.limits.reward_s) as limit:
                return await value
        except Exception as error:  # as above
            if limit.expired():
                _unless_left_out(reward, rollout, error)
                return None
            raise _failure(reward, rollout, error) from error

    judged = asyncio.gather(*map(judge, rollouts, values))
    while not judged.done():
        preemption.poll()
        await asyncio.wait([judged], timeout=POLL_S)
    return list(judged.result())


def _unless_left_out(reward: BoundReward, rollout: Rollout, error: BaseException) -> None:
    """A reward took too long: unless `failure.reward` leaves the rollout unjudged, that is the run's end."""
    if reward.limits.reward == "unjudged":
        return
    raise RunError(
        f"reward `{reward.name}` must judge a rollout within failure.reward_s={reward.limits.reward_s:g} s, and was "
        f"still at {_place(reward, error)} for task {rollout.task.key}, whose completion begins {rollout.text[:80]!r}: "
        "mend it, raise the bound, or set failure.reward=unjudged"
    ) from error


def _number(reward: BoundReward, rollout: Rollout, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or not math.isfinite(float(value)):
        raise RunError(
            f"reward `{reward.name}` must return a finite number, or None where it cannot judge (got {value!r} for "
            f"task {rollout.task.key}): change its return value in {_source(reward.call)}"
        )
    return float(value)


def _failure(reward: BoundReward, rollout: Rollout, error: Exception) -> RunError:
    return RunError(
        f"reward `{reward.name}` must judge every rollout, and raised {type(error).__name__}: {error} at "
        f"{_place(reward, error)} for task {rollout.task.key}, whose completion begins {rollout.text[:80]!r}: mend it, "
        "or return None where it cannot judge"
    )


def _place(reward: BoundReward, error: BaseException) -> str:
    """The last line of the reward's own file that an error came through."""
    source = _source(reward.call)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    return f"{source}:{frames[-1].lineno}" if frames else source


def _source(call: Callable[..., Any]) -> str:
    """The file that the reward's function, or the class of a callable object, stands in."""
    while isinstance(call, partial):
        call = call.func
    function = inspect.unwrap(call) if inspect.isroutine(call) else type(call).__call__
    code = getattr(function, "__code__", None)
    return code.co_filename if code is not None else repr(call)
