"""Groups that were generated and not yet trained, as plain JSON: token ids and log-probs bit for bit."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlpost.talk import Turn
from rlpost.types import Group, Rollout, Task

PLAIN = ("finish_reason", "version", "text", "role", "hint", "level", "interrupted")
"""Fields of a rollout that are saved as they are; what comes after generation, such as rewards, is worked out again."""


def saved(group: Group, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """A group with what was generated for it."""
    return {
        "id": group.id,
        "task": asdict(group.task),
        "prompt_ids": list(group.prompt_ids),
        "seed": group.seed,
        "begun": group.begun,
        "version": group.version,
        "rollouts": [_saved(rollout) for rollout in rollouts],
    }


def group_of(state: Mapping[str, Any]) -> Group:
    """The group that was saved.

    >>> group = Group(3, Task("a", "1+1=", hints=("2",)), [], prompt_ids=(5, 6), seed=7, begun=2)
    >>> group_of(saved(group, [])) == group
    True
    """
    task = Task(**{**state["task"], "hints": tuple(state["task"]["hints"])})
    rollouts = [_rollout(one, task, state["id"]) for one in state["rollouts"]]
    plain = {name: state[name] for name in ("seed", "begun", "version")}
    return Group(state["id"], task, rollouts, prompt_ids=tuple(state["prompt_ids"]), **plain)


def _saved(rollout: Rollout) -> dict[str, Any]:
    return {
        **{name: getattr(rollout, name) for name in PLAIN},
        "later_versions": rollout.later_versions,
        "turns": [asdict(turn) for turn in rollout.turns],
        "prompt_ids": list(rollout.prompt_ids),
        "sampled_prompt_ids": list(rollout.sampled_prompt_ids),
        "token_ids": _packed("q", rollout.token_ids),
        "behavior_logp": _packed("d", rollout.behavior_logp),
    }


def _rollout(state: Mapping[str, Any], task: Task, group: int) -> Rollout:
    return Rollout(
        task,
        group,
        prompt_ids=tuple(state["prompt_ids"]),
        sampled_prompt_ids=tuple(state["sampled_prompt_ids"]),
        token_ids=_unpacked("q", state["token_ids"]),
        behavior_logp=_unpacked("d", state["behavior_logp"]),
        later_versions=tuple((first, version) for first, version in state["later_versions"]),
        turns=tuple(Turn(**turn) for turn in state.get("turns", ())),
        **{name: state[name] for name in PLAIN},
    )


def _packed(kind: str, values: Sequence[float]) -> str:
    return base64.b64encode(array(kind, values).tobytes()).decode()


def _unpacked(kind: str, text: str) -> tuple[Any, ...]:
    return tuple(array(kind, base64.b64decode(text)))
