"""Groups -> documents -> optimizer steps of micro-batches, equally many on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rlpost.aggregation import Aggregation, StepCounts, count, sum_counts, token_weights
from rlpost.balance import balanced, cost
from rlpost.document import Document, block_length, places, span
from rlpost.noise_scale import cells_of
from rlpost.packing import Block, Packer, with_documents
from rlpost.types import Batch, Group, Micro, Rollout
from rlpost.world import Ranks

ScoreOf = Callable[[Micro], Mapping[str, Tensor]]
"""A forward pass: micro-batch -> named figures of each trained token `[B, T]`."""


def with_scores(documents: Sequence[Document], packer: Packer, world: Ranks, score_of: ScoreOf) -> list[Document]:
    """The documents with what a forward pass says of their completion tokens; every rank runs as many passes."""
    documents, own = packer.columns.together(documents)
    layout = packer.layout(documents)
    # Before the first pass: with sharded weights a pass waits for all ranks, and so does this.
    missing = world.max(len(layout)) - len(layout)
    found: list[dict[str, Tensor]] = [{} for _ in documents]
    with torch.no_grad():
        for rows in layout:
            scores = score_of(packer.micro_of_blocks(with_documents(rows, documents)))
            for name, x_BT in scores.items():
                for row, x_T in zip(rows, x_BT.float().cpu(), strict=True):
                    for i, place, tokens in _spans(row, documents):
                        found[i][name] = torch.zeros(len(documents[i].token_ids))
                        found[i][name][tokens] = x_T[place]
        for _ in range(missing):
            score_of(packer.empty())
    return [replace(one, scores={**one.scores, **scores}) for one, scores in zip(documents, found, strict=True)][own]


def _spans(row: Sequence[Block], documents: Sequence[Document]) -> Iterator[tuple[int, slice, slice]]:
    """(index, positions, completion tokens) of every document of a row, as `span` has them."""
    start = 0
    for block in row:
        members = [documents[i] for i in block]
        for i, (document, begin, _) in zip(block, places(members, start), strict=True):
            yield i, *span(document, begin)
        start += block_length(members)


def make_batch(
    documents: Sequence[Document],
    packer: Packer,
    world: Ranks,
    aggregation: Aggregation = "token_mean",
    max_tokens: int = 1,
    *,
    cells: int = 1,
) -> Batch:
    """One optimizer step from this rank's documents: weights over all ranks, and as many micro-batches on each.

    Documents with no trained token are left out, and some move to ranks with less to do. Those that sampling left out
    (`inclusion` 0) are in the denominators, and the others weigh 1 / inclusion: the gradient's mean over samples is
    that of all. `max_tokens` is the constant of `seq_sum_const`. With `cells`, prompts are dealt to so many, and no
    micro-batch has documents of two (`noise_scale.py`).
    """
    documents, _ = packer.columns.together([document for document in documents if document.num_trained])
    world = packer.columns.groups(world)
    population = _Counts.of(documents)
    documents = [document for document in documents if document.inclusion]
    documents = balanced(documents, [cost(one.length, packer.hidden_size) for one in documents], world)
    every_rank = world.all_gather_object((population, {name for one in documents for name in one.scores}))
    step, correct = (sum_counts(getattr(each, name) for each, _ in every_rank) for name in ("trained", "imitated"))
    lengths, groups = [document.num_trained for document in documents], [document.group for document in documents]
    imitated = [length * document.correct for length, document in zip(lengths, documents, strict=True)]
    weights = token_weights(aggregation, lengths, groups, step, max_tokens=max_tokens)
    imitation = token_weights("token_mean", imitated, groups, correct, max_tokens=1)
    weighted = [
        replace(one, weight=weight / one.inclusion, imitation_weight=imitation_weight / one.inclusion)
        for one, weight, imitation_weight in zip(documents, weights, imitation, strict=True)
    ]
    micros, of_cell, prompts = _in_cells(weighted, packer, list(step.group_tokens), cells)
    missing = world.max(len(micros)) - len(micros)
    scores = sorted(set().union(*(names for _, names in every_rank)))
    return Batch(
        micros=(*micros, *(packer.empty(scores) for _ in range(missing))),
        step_tokens=sum(each.tokens for each, _ in every_rank),
        cells=(*of_cell, *[0] * missing),
        prompts=prompts,
    )


def _in_cells(
    documents: Sequence[Document], packer: Packer, groups: Sequence[int], cells: int
) -> tuple[list[Micro], list[int], tuple[int, ...]]:
    """Micro-batches of one cell after the other, the cell of each, and how many of all ranks' `groups` a cell has."""
    cell_of = cells_of(groups, cells)
    parts = [packer.micros([one for one in documents if cell_of[one.group] == cell]) for cell in range(cells)]
    of_cell = [cell for cell, part in enumerate(parts) for _ in part]
    prompts = tuple(list(cell_of.values()).count(cell) for cell in range(cells))
    return [micro for part in parts for micro in part], of_cell, prompts


@dataclass(frozen=True, slots=True)
class _Counts:
    """What some documents bring to a step's denominators, and the tokens that are trained of them."""

    trained: StepCounts
    imitated: StepCounts
    tokens: int

    @classmethod
    def of(cls, documents: Sequence[Document]) -> _Counts:
        lengths, groups = [one.num_trained for one in documents], [one.group for one in documents]
        imitated = [length * one.correct for length, one in zip(lengths, documents, strict=True)]
        tokens = sum(length for length, one in zip(lengths, documents, strict=True) if one.inclusion)
        return cls(count(lengths, groups), count(imitated, groups), tokens)


def in_parts(
    documents: Sequence[Document], groups: Sequence[int], parts: int, *, cut: bool = False
) -> list[list[Document]]:
    """A batch of rollouts in `parts` nearly equal parts of whole groups; `groups` lists this rank's, in order.

    With `cut`, groups may be cut where there are fewer than parts.
    """
    if cut and parts > len(groups):
        bounds = [len(documents) * i // parts for i in range(parts + 1)]
        return [list(documents[start:stop]) for start, stop in pairwise(bounds)]
    cuts = [len(groups) * i // parts for i in range(parts + 1)]
    members: dict[int, list[Document]] = {group: [] for group in groups}
    for document in documents:
        members[document.group].append(document)
    return [[one for group in groups[start:stop] for one in members[group]] for start, stop in pairwise(cuts)]


def documents_of(
    groups: Sequence[Group], *, train_truncated: bool = True, train_earlier: bool = True
) -> list[Document]:
    """The rollouts of all groups, in order, as something to train on."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [document(one, train_truncated=train_truncated, train_earlier=train_earlier) for one in rollouts]


def document(rollout: Rollout, *, train_truncated: bool = True, train_earlier: bool = True) -> Document:
    """A rollout as something to train on; one that could not be judged keeps its place with no trained token.

    Without `train_earlier`, tokens are context alone where a later version wrote what follows them.
    """
    silent = rollout.reward is None or (rollout.truncated and not train_truncated)
    length = len(rollout.token_ids)
    context = length if silent else 0 if train_earlier else rollout.versions[-1][0]
    return Document(
        prompt_ids=rollout.prompt_ids,
        token_ids=rollout.token_ids,
        behavior_logp=(math.nan,) * context + rollout.behavior_logp[context:],
        group=rollout.group,
        version=rollout.version,
        later_versions=rollout.later_versions,
        off_policy=rollout.off_policy,
        sampled_prompt_ids=rollout.sampled_prompt_ids,
        inclusion=rollout.inclusion,
        correct=bool(rollout.passed),
    )
