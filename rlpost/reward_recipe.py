"""The recipe's rewards, each with a name, its limits, and where it runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewards import QUICK
from rlpost.cluster_recipe import Failure
from rlpost.errors import RecipeError
from rlpost.judging import shape_of
from rlpost.metrics import METRICS
from rlpost.plugins import bind
from rlpost.score import BoundReward, Rewards

POLICIES = ("raise", "drop", "zero")


def bind_rewards(
    rewards: Sequence[Mapping[str, Any]],
    limits: Failure | None = None,
    *,
    of_groups: Sequence[Mapping[str, Any]] = (),
) -> Rewards:
    """The recipe's rewards, each under its own part name: the second `brevity` is `brevity_2`."""
    limits = limits or Failure()
    # A part is logged as reward/<name>, beside figures that have taken some names already.
    taken = {metric.removeprefix("reward/") for metric in METRICS if metric.startswith("reward/")}
    each = [_bound(plugin, f"rewards.{i}", limits, taken) for i, plugin in enumerate(rewards)]
    groups = [_bound(plugin, f"group_rewards.{i}", limits, taken) for i, plugin in enumerate(of_groups)]
    return Rewards(each, groups, limits)


def reward_problems(rewards: Sequence[Mapping[str, Any]], of_groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that is wrong with the rewards of a recipe."""
    problems = []
    if not rewards:
        problems.append("rewards must name at least one reward, as in `rewards: [{use: final_number}]`")
    for section, plugins in (("rewards", rewards), ("group_rewards", of_groups)):
        for i, plugin in enumerate(plugins):
            try:
                _bound(plugin, f"{section}.{i}", Failure(), set())
            except RecipeError as error:
                problems += error.problems
    return problems


def _bound(plugin: Mapping[str, Any], where: str, limits: Failure, taken: set[str]) -> BoundReward:
    problems = _own_problems(plugin, where)
    try:
        call = bind(plugin, "rewards", where=where, skip=1)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from None
    shape = shape_of(call.func)
    of_group = where.startswith("group_rewards")
    if of_group != (shape == "group"):
        other = "rewards" if of_group else "group_rewards"
        takes = "a group (its first parameter is a `Group`)" if of_group else "a rollout or a list of rollouts"
        problems.append(f"{where}.use must be a function of {takes} (got one of a {shape}): list it under {other}")
    if problems:
        raise RecipeError(problems)
    own = replace(
        limits,
        reward=plugin.get("on_error") or limits.reward,
        reward_s=plugin.get("timeout_s", limits.reward_s),
    )
    isolated = plugin.get("isolate", plugin["use"] not in QUICK)
    name = _name(plugin["use"].rpartition(":")[2], taken)
    # A model may write what a grader chokes on, and that is not worth a run; an error of its own is.
    on_hang = None if plugin.get("on_error") else getattr(inspect.getmodule(call.func), "ON_HANG", None)
    return BoundReward(name, float(plugin.get("weight", 1.0)), call, own, shape, plugin if isolated else None, on_hang)


def _name(stem: str, taken: set[str]) -> str:
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    return name


def _own_problems(plugin: Mapping[str, Any], where: str) -> list[str]:
    """Of what the run reads itself and does not hand to the reward."""
    problems = []
    weight, policy = plugin.get("weight", 1.0), plugin.get("on_error")
    seconds, isolate = plugin.get("timeout_s"), plugin.get("isolate", True)
    if not _is_number(weight):
        problems.append(f"{where}.weight must be a finite number (got {weight!r})")
    if policy is not None and policy not in POLICIES:
        problems.append(f"{where}.on_error must be one of {', '.join(POLICIES)} (got {policy!r})")
    if seconds is not None and not (_is_number(seconds) and seconds > 0):
        problems.append(f"{where}.timeout_s must be seconds > 0, or null for no bound (got {seconds!r})")
    if not isinstance(isolate, bool):
        problems.append(f"{where}.isolate must be true or false (got {isolate!r})")
    return problems


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
