"""Groups -> packed rows: optimizer steps of micro-batches, equally many on every rank.

Documents (prompt and completion) are packed into rows without padding between them; rows of similar length share a
micro-batch. The positions left over at a row's end form one more document that nothing is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from rlpost.aggregation import Aggregation, count, sum_counts, token_weights
from rlpost.recipe import Recipe
from rlpost.types import Batch, Group, Micro, Rollout
from rlpost.world import World

DENSE_ROW_TOKENS = 512
"""Row length where attention pays for its square: long enough to amortise, short enough not to waste."""

ScoreOf = Callable[[Micro], Mapping[str, Tensor]]
"""A forward pass: micro-batch -> named figures of each trained token `[B, T]`."""


@dataclass(frozen=True, eq=False)
class Document:
    """One sequence to train on: the completion, given the prompt. `T` is the number of completion tokens.

    >>> Document(prompt_ids=(5, 6), token_ids=(7, 1), behavior_logp=(-0.1, -0.2), advantage=1.0).length
    4
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    behavior_logp: tuple[float, ...]
    advantage: float | Tensor = 0.0
    """One for all tokens, or `[T]`."""
    group: int = 0
    """Documents of one group came from one prompt, on whatever rank."""
    version: int = 0
    correct: bool = False
    """Whether the answer may be imitated."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """Figures of each completion token `[T]` from earlier forward passes."""
    weight: float = 0.0
    imitation_weight: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def trained(self) -> list[bool]:
        """Which completion tokens enter the loss: those with a finite log-prob, and something in front of them."""
        finite = [math.isfinite(logp) for logp in self.behavior_logp]
        return finite if self.prompt_ids else [False, *finite[1:]][: len(finite)]

    @property
    def num_trained(self) -> int:
        """Completion tokens that enter the loss."""
        return sum(self.trained)


@dataclass(frozen=True, slots=True)
class Packer:
    """How many positions a row and a micro-batch may have, and where the tensors go."""

    micro_tokens: int
    row_tokens: int
    device: torch.device

    def layout(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Micro-batches of rows of document indices, longest rows first."""
        rows = pack(lengths, max(self.row_tokens, *lengths, 0)) if lengths else []
        rows.sort(key=lambda row: -sum(lengths[i] for i in row))
        micros, start = [], 0
        while start < len(rows):
            stop = start + max(1, self.micro_tokens // sum(lengths[i] for i in rows[start]))
            micros.append(rows[start:stop])
            start = stop
        return micros

    def micros(self, documents: Sequence[Document]) -> list[Micro]:
        """This rank's documents as micro-batches of packed rows."""
        layout = self.layout([document.length for document in documents])
        return [self.micro([[documents[i] for i in row] for row in rows]) for rows in layout]

    def micro(self, rows: Sequence[Sequence[Document]], width: int = 0) -> Micro:
        """The tensors of some rows, as wide as the longest, or as `width`."""
        width = max(width, *(sum(document.length for document in row) for row in rows))
        shape = (len(rows), width)
        scores = sorted({name for row in rows for document in row for name in document.scores})
        whole = {name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "position", "target", "version")}
        mask_BT, document_BT = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
        names = ("behavior_logp", "advantage", "weight", "imitation_weight", *scores)
        trained: dict[str, Tensor] = {name: torch.zeros(shape) for name in names}
        number = 0
        for b, row in enumerate(rows):
            end = 0
            for document, start in zip(row, starts(row), strict=True):
                ids = torch.tensor(document.prompt_ids + document.token_ids, dtype=torch.long)
                end = start + len(ids)
                whole["tokens"][b, start:end] = ids
                whole["position"][b, start:end] = torch.arange(len(ids))
                whole["target"][b, start : end - 1] = ids[1:]
                whole["version"][b, start:end] = document.version
                document_BT[b, start:end] = number
                place, tokens = span(document, start)
                kept = torch.tensor(document.trained[tokens], dtype=torch.bool)
                mask_BT[b, place] = kept
                for name, x_BT in trained.items():
                    values = _values(document, name)[tokens]
                    x_BT[b, place] = torch.where(kept, values, torch.zeros_like(values))
                number += 1
            whole["position"][b, end:] = torch.arange(width - end)
        whole |= {"mask": mask_BT, "document": document_BT}
        return self._micro({name: x_BT.to(self.device, non_blocking=True) for name, x_BT in (whole | trained).items()})

    def _micro(self, at: dict[str, Tensor]) -> Micro:
        return Micro(
            tokens_BT=at.pop("tokens"),
            position_BT=at.pop("position"),
            target_BT=at.pop("target"),
            mask_BT=at.pop("mask"),
            behavior_logp_BT=at.pop("behavior_logp"),
            adv_BT=at.pop("advantage"),
            document_BT=at.pop("document"),
            weight_BT=at.pop("weight"),
            imitation_weight_BT=at.pop("imitation_weight"),
            version_BT=at.pop("version"),
            scores=at,
        )

    def empty(self, scores: Sequence[str] = ()) -> Micro:
        """A micro-batch that trains nothing: it keeps a rank in step with one that has more work."""
        nothing = {name: torch.zeros(0) for name in scores}
        return self.micro([[Document((0,), (), (), scores=nothing)]], 2)


def starts(row: Sequence[Document]) -> Iterator[int]:
    """Where each document of a row begins."""
    start = 0
    for document in row:
        yield start
        start += document.length


def span(document: Document, start: int) -> tuple[slice, slice]:
    """The positions that speak of a document's completion, and the completion tokens that they speak of.

    Position s predicts token s + 1, so the completion's first token is predicted by the prompt's last; where there is
    no prompt, nothing predicts it.
    """
    end = start + document.length - 1
    if not document.prompt_ids:
        return slice(start, max(end, start)), slice(1, None)
    return slice(start + len(document.prompt_ids) - 1, end), slice(0, None)


def _values(document: Document, name: str) -> Tensor:
    """A figure of each completion token `[T]`, float32."""
    length = len(document.token_ids)
    if name == "behavior_logp":
        return torch.tensor(document.behavior_logp, dtype=torch.float32)
    if name in document.scores:
        return document.scores[name].to("cpu", torch.float32)
    return torch.as_tensor(getattr(document, name, 0.0), dtype=torch.float32).expand(length)


def make_packer(recipe: Recipe, world: World) -> Packer:
    """The packer of a recipe: rows as long as a micro-batch with flash attention, short ones without."""
    row_tokens = recipe.batch.row_tokens
    if row_tokens is None:
        from rlpost.policy import uses_flash_attention

        # Flash attention's variable-length call takes one row; a batch of rows would be padded again.
        row_tokens = recipe.batch.micro_tokens if uses_flash_attention(recipe.model) else DENSE_ROW_TOKENS
    return Packer(recipe.batch.micro_tokens, min(row_tokens, recipe.batch.micro_tokens), world.device)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of the documents of each row, no row longer than `capacity`.

    >>> pack([3, 5, 4, 2], capacity=7)
    [[1, 3], [2, 0]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if at is None:
            rows.append([])
            free.append(capacity)
            at = len(rows) - 1
        rows[at].append(i)
        free[at] -= lengths[i]
    return rows


def with_scores(documents: Sequence[Document], packer: Packer, world: World, score_of: ScoreOf) -> list[Document]:
    """The documents with what a forward pass says of their completion tokens; every rank runs as many passes."""
    layout = packer.layout([document.length for document in documents])
    found: list[dict[str, Tensor]] = [{} for _ in documents]
    with torch.no_grad():
        for rows in layout:
            micro = packer.micro([[documents[i] for i in row] for row in rows])
            for name, x_BT in score_of(micro).items():
                for row, x_T in zip(rows, x_BT.float().cpu(), strict=True):
                    for i, start in zip(row, starts([documents[i] for i in row]), strict=True):
                        place, tokens = span(documents[i], start)
                        found[i][name] = torch.zeros(len(documents[i].token_ids))
                        found[i][name][tokens] = x_T[place]
        for _ in range(world.max(len(layout)) - len(layout)):
            score_of(packer.empty())
    return [replace(one, scores={**one.scores, **scores}) for one, scores in zip(documents, found, strict=True)]


def make_batch(
    documents: Sequence[Document],
    packer: Packer,
    world: World,
    aggregation: Aggregation = "token_mean",
    max_tokens: int = 1,
) -> Batch:
    """One optimizer step from this rank's documents: weights over all ranks, and as many micro-batches on each.

    Documents with no trained token are left out. `max_tokens` is the constant of `seq_sum_const`.
    """
    documents = [document for document in documents if document.num_trained]
    lengths = [document.num_trained for document in documents]
    imitated = [length * document.correct for length, document in zip(lengths, documents, strict=True)]
    groups = [document.group for document in documents]
    mine = count(lengths, groups), count(imitated, groups), {name for one in documents for name in one.scores}
    every_rank = world.all_gather_object(mine)
    step, correct = sum_counts(all_ for all_, _, _ in every_rank), sum_counts(few for _, few, _ in every_rank)
    weights = token_weights(aggregation, lengths, groups, step, max_tokens=max_tokens)
    imitation = token_weights("token_mean", imitated, groups, correct, max_tokens=1)
    micros = packer.micros(
        [
            replace(document, weight=weight, imitation_weight=imitation_weight)
            for document, weight, imitation_weight in zip(documents, weights, imitation, strict=True)
        ]
    )
    missing = world.max(len(micros)) - len(micros)
    scores = sorted(set().union(*(names for _, _, names in every_rank)))
    return Batch(micros=(*micros, *(packer.empty(scores) for _ in range(missing))), step_tokens=step.tokens)


def in_parts(documents: Sequence[Document], groups: Sequence[int], parts: int) -> list[list[Document]]:
    """A batch of rollouts in `parts` nearly equal parts of whole groups; `groups` lists this rank's, in order."""
    cuts = [len(groups) * i // parts for i in range(parts + 1)]
    members: dict[int, list[Document]] = {group: [] for group in groups}
    for document in documents:
        members[document.group].append(document)
    return [[one for group in groups[start:stop] for one in members[group]] for start, stop in pairwise(cuts)]


def documents_of(groups: Sequence[Group], *, train_truncated: bool = True) -> list[Document]:
    """The rollouts of all groups, in order, as something to train on."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [document(rollout, train_truncated=train_truncated) for rollout in rollouts]


def document(rollout: Rollout, *, train_truncated: bool = True) -> Document:
    """A rollout as something to train on; one that could not be judged keeps its place with no trained token."""
    silent = rollout.reward is None or (rollout.truncated and not train_truncated)
    return Document(
        prompt_ids=rollout.prompt_ids,
        token_ids=rollout.token_ids,
        behavior_logp=(math.nan,) * len(rollout.token_ids) if silent else rollout.behavior_logp,
        group=rollout.group,
        version=rollout.version,
        correct=bool(rollout.passed),
    )
