"""Tasks -> complete groups of rollouts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from rlpost.algorithm_recipe import Interruption
from rlpost.generate.base import Generator
from rlpost.render import Renderer
from rlpost.types import Group, Request, Rollout, Sampling, Task


def shard(items: Sequence[Task], rank: int, size: int) -> list[tuple[int, Task]]:
    """This rank's share, each with its place in the whole.

    >>> shard(["a", "b", "c", "d"], rank=1, size=2)
    [(2, 'c'), (3, 'd')]
    """
    start, stop = len(items) * rank // size, len(items) * (rank + 1) // size
    return list(enumerate(items))[start:stop]


def collect(
    generator: Generator,
    renderer: Renderer,
    tasks: Sequence[tuple[int, Task]],
    sampling: Sampling,
    *,
    group_size: int,
    first_group: int,
    seed: int,
    interruption: Interruption | None = None,
) -> list[Group]:
    """One group of `group_size` rollouts for each (place, task); the group's id is `first_group + place`."""
    requests = [
        Request(
            group=first_group + place,
            task=task,
            prompt_ids=renderer.prompt_ids(task),
            n=group_size,
            seed=request_seed(seed, first_group + place),
        )
        for place, task in tasks
    ]
    rollouts = generator.generate(requests, sampling)
    if interruption is not None and interruption.text is not None:
        rollouts = interrupted(rollouts, generator, renderer, sampling, interruption)
    answers: dict[int, list[Rollout]] = {request.group: [] for request in requests}
    for rollout in rollouts:
        answers[rollout.group].append(rollout)
    return [Group(id=request.group, task=request.task, rollouts=answers[request.group]) for request in requests]


def interrupted(
    rollouts: Sequence[Rollout],
    generator: Generator,
    renderer: Renderer,
    sampling: Sampling,
    interruption: Interruption,
) -> list[Rollout]:
    """Rollouts that ran out of tokens get the interruption's text and may conclude. ScaleRL, arXiv:2510.13786.

    The text is the run's and not the policy's: it has no log-prob, so nothing is trained on it.
    """
    text_ids = renderer.text_ids(interruption.text or "")
    first = {rollout.group: i for i, rollout in reversed(list(enumerate(rollouts)))}
    requests = [
        Request(
            group=i,
            task=rollout.task,
            prompt_ids=(*rollout.prompt_ids, *rollout.token_ids, *text_ids),
            n=1,
            seed=request_seed(first[rollout.group] - i - 1, rollout.group),  # negative: no run has such a seed
        )
        for i, rollout in enumerate(rollouts)
        if rollout.truncated
    ]
    whole = list(rollouts)
    for end in generator.generate(requests, replace(sampling, max_new_tokens=interruption.answer_tokens)):
        begun = rollouts[end.group]
        token_ids = (*begun.token_ids, *text_ids, *end.token_ids)
        whole[end.group] = replace(
            begun,
            token_ids=token_ids,
            behavior_logp=(*begun.behavior_logp, *(math.nan for _ in text_ids), *end.behavior_logp),
            finish_reason=end.finish_reason,
            text=renderer.decode(token_ids),
            interrupted=True,
        )
    return whole


def request_seed(seed: int, group: int) -> int:
    """A seed below 2^31 that belongs to this run and group, whatever the number of ranks."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:4], "big") >> 1
