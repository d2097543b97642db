"""Tasks -> groups of rollouts, request by request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rlpost.algorithm_recipe import Interruption
from rlpost.generate.base import Generator, Whole
from rlpost.lockstep import in_turns
from rlpost.render import Renderer
from rlpost.seeds import seed_of
from rlpost.types import Group, Request, Rollout, Sampling, Task

T = TypeVar("T")


def shard(items: Sequence[T], rank: int, size: int) -> list[tuple[int, T]]:
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
    groups = new_groups(renderer, tasks, first_group=first_group, seed=seed)
    requests = [group.request(group_size) for group in groups]
    add_to(groups, answers(generator, renderer, requests, sampling, interruption))
    return groups


def new_groups(
    renderer: Renderer,
    tasks: Sequence[tuple[int, Task]],
    *,
    first_group: int,
    seed: int,
    begun: int = 0,
    version: int = 0,
) -> list[Group]:
    """An empty group for each (place, task); its id is `first_group + place`."""
    ids = [first_group + place for place, _ in tasks]
    return [
        Group(
            id,
            task,
            [],
            prompt_ids=renderer.prompt_ids(task),
            seed=request_seed(seed, id),
            begun=begun,
            version=version,
        )
        for id, (_, task) in zip(ids, tasks, strict=True)
    ]


def add_to(groups: Sequence[Group], rollouts: Sequence[Rollout]) -> None:
    """Put each rollout into its group."""
    by_id = {group.id: group for group in groups}
    for rollout in rollouts:
        by_id[rollout.group].rollouts.append(rollout)


def answers(
    generator: Generator,
    renderer: Renderer,
    requests: Sequence[Request],
    sampling: Sampling,
    interruption: Interruption | None = None,
    *,
    whole: Whole | None = None,
) -> list[Rollout]:
    """What was asked for: generated, in one call or over several (`sampling.rollout`), or given with the request."""
    interrupts = interruption is not None and interruption.text is not None
    wanted = [request for request in requests if request.given is None]
    if sampling.rollout is not None:
        rollouts = in_turns(generator, renderer, wanted, sampling, whole=whole)
    elif whole is None or interrupts:  # what is interrupted has not ended yet
        rollouts = generator.generate(wanted, sampling)
    else:
        rollouts = generator.generate(wanted, sampling, whole)
    if interruption is not None and interrupts:
        rollouts = interrupted(rollouts, generator, renderer, sampling, interruption)
    return [*rollouts, *(_given(request, renderer) for request in requests if request.given is not None)]


def _given(request: Request, renderer: Renderer) -> Rollout:
    """An answer that comes with the request; it counts as certain to its writer, whose log-probs nobody knows.

    pi_phi = 1, as in LUFFY, arXiv:2504.14945.
    """
    assert request.given is not None
    token_ids = renderer.completion_ids(request.given)
    certain = (0.0,) * len(token_ids)
    return request.rollout(token_ids, certain, finish_reason="stop", version=-1, text=request.given)


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
            prompt_ids=(*rollout.sampled_prompt_ids, *rollout.token_ids, *text_ids),
            n=1,
            seed=seed_of(f"{rollout.group}:{i - first[rollout.group]}:{rollout.token_ids}"),
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
    return seed_of(f"{seed}:{group}")
