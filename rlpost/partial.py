"""Partial rollouts: so many tokens of an answer a step, the rest under the weights of later steps.

Kimi k1.5, arXiv:2501.12599, section 2.6. A long answer holds nobody: what it has written so far is kept with the log-
probs and the version it was sampled with, and goes on in the next step behind those very tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlpost.generate.base import Generator, circles
from rlpost.render import Renderer
from rlpost.seeds import seed_of
from rlpost.types import Group, Request, Rollout, Sampling


def is_unfinished(rollout: Rollout, sampling: Sampling) -> bool:
    """Whether an answer ran into the limit of a step, and not into its own."""
    return rollout.finish_reason == "length" and len(rollout.token_ids) < sampling.max_new_tokens


def write_part(
    groups: Sequence[Group],
    generator: Generator,
    renderer: Renderer,
    sampling: Sampling,
    *,
    group_size: int,
    tokens: int,
) -> list[Group]:
    """Write up to `tokens` more of every answer; returns the groups that are still unfinished.

    A group without rollouts is begun. All of it is one call of the generator.
    """
    places: list[tuple[Group, int | None]] = []
    requests: list[Request] = []
    for group in groups:
        if not group.rollouts:
            places += [(group, None)] * group_size
            requests.append(replace(group.request(group_size), limit=tokens))
            continue
        for i, rollout in enumerate(group.rollouts):
            if is_unfinished(rollout, sampling):
                places.append((group, i))
                requests.append(continuation(rollout, i, group, sampling, tokens))
    for (group, place), found in zip(places, generator.generate(requests, sampling), strict=True):
        whole = found if place is None else joined(group.rollouts[place], found, renderer)
        if sampling.repeats is not None and whole.truncated and circles(whole.token_ids, *sampling.repeats):
            whole = replace(whole, finish_reason="repetition")
        if place is None:
            group.rollouts.append(whole)
        else:
            group.rollouts[place] = whole
    return [group for group in groups if any(is_unfinished(rollout, sampling) for rollout in group.rollouts)]


def continuation(rollout: Rollout, i: int, group: Group, sampling: Sampling, tokens: int) -> Request:
    """Ask for what follows an unfinished answer, the group's i-th."""
    done = len(rollout.token_ids)
    return Request(
        group=group.id,
        task=group.task,
        prompt_ids=(*rollout.sampled_prompt_ids, *rollout.token_ids),
        n=1,
        seed=seed_of(f"{group.seed}:{i}:{done}"),
        limit=min(tokens, sampling.max_new_tokens - done),
    )


def joined(begun: Rollout, end: Rollout, renderer: Renderer) -> Rollout:
    """An answer with its next part, each token with its own log-prob and version."""
    newest, done = begun.versions[-1][1], len(begun.token_ids)
    spans = [(done + first, version) for first, version in end.versions]
    if spans[0][1] == newest:
        spans.pop(0)
    token_ids = (*begun.token_ids, *end.token_ids)
    return replace(
        begun,
        token_ids=token_ids,
        behavior_logp=(*begun.behavior_logp, *end.behavior_logp),
        later_versions=(*begun.later_versions, *spans),
        finish_reason=end.finish_reason,
        text=renderer.decode(token_ids),
    )
