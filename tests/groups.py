"""Groups and rollouts made by hand, for tests of explorers."""

from __future__ import annotations

from rlpost.types import Group, Rollout, Sampling, Task

TASK = Task("a", "7-0+6-3=", answer="10", solution="7-0=7;7+6=13;13-3=10;#10", hints=("weak", "strong"))


class Letters:
    """A renderer with one token a character."""

    context = 64

    def prompt_ids(self, task):
        text = task.prompt if isinstance(task.prompt, str) else task.prompt[-1]["content"]
        return tuple(map(ord, text))

    def completion_ids(self, text):
        return (*map(ord, text), 0)

    def text_ids(self, text):
        return tuple(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


def sampling(max_new_tokens: int = 8) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens)


def rollout(passed: bool | None, *, group: int = 0, task: Task = TASK, text: str = "", **other) -> Rollout:
    """An answer of the policy, judged by one reward."""
    reward = None if passed is None else float(passed)
    fields = {"prompt_ids": (1,), "sampled_prompt_ids": (1,), "token_ids": (5, 6), "behavior_logp": (-1.0, -0.5)}
    parts = {"right": reward}
    whole = {**fields, "finish_reason": "stop", "version": 0, "reward": reward, "reward_parts": parts, **other}
    return Rollout(task, group, text=text, **whole)


def guided(passed: bool | None, level: int = 1, hint: str = "", **other) -> Rollout:
    """An answer under a hint."""
    return rollout(passed, role="guided", level=level, hint=hint, sampled_prompt_ids=(1, 2), **other)


def group(*passed: bool | None, id: int = 0, task: Task = TASK) -> Group:
    """A group with these answers of the policy."""
    whole = Group(id, task, [rollout(one, group=id, task=task) for one in passed], seed=100)
    whole.prompt_ids = Letters().prompt_ids(task)
    return whole
