"""Tasks -> complete groups of rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
    answers: dict[int, list[Rollout]] = {request.group: [] for request in requests}
    for rollout in generator.generate(requests, sampling):
        answers[rollout.group].append(rollout)
    return [Group(id=request.group, task=request.task, rollouts=answers[request.group]) for request in requests]


def request_seed(seed: int, group: int) -> int:
    """A seed below 2^31 that belongs to this run and group, whatever the number of ranks."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:4], "big") >> 1
