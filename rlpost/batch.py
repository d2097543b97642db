"""Groups -> packed rows: optimizer steps of micro-batches, equally many on every rank.

Documents (prompt and completion) are packed into rows without padding between them; rows of similar length share a
micro-batch. The positions left over at a row's end form one more document that nothing is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from rlpost.recipe import Recipe
from rlpost.types import Batch, Group, Micro, Rollout
from rlpost.world import World

DENSE_ROW_TOKENS = 512
"""Row length where attention pays for its square: long enough to amortise, short enough not to waste."""


@dataclass(frozen=True, slots=True)
class Document:
    """One sequence to train on: the completion, given the prompt.

    >>> Document(prompt_ids=(5, 6), token_ids=(7, 1), behavior_logp=(-0.1, -0.2), advantage=1.0).length
    4
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    behavior_logp: tuple[float, ...]
    advantage: float

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """Completion tokens that enter the loss: those with a finite log-prob, and something in front of them."""
        return sum(map(math.isfinite, self.behavior_logp if self.prompt_ids else self.behavior_logp[1:]))


@dataclass(frozen=True, slots=True)
class Packer:
    """How many positions a row and a micro-batch may have, and where the tensors go."""

    micro_tokens: int
    row_tokens: int
    device: torch.device

    def micros(self, documents: Sequence[Document]) -> list[Micro]:
        """This rank's documents as micro-batches of packed rows, longest rows first."""
        longest = max((document.length for document in documents), default=0)
        capacity = max(self.row_tokens, longest)
        rows = [[documents[i] for i in row] for row in pack([d.length for d in documents], capacity)]
        rows.sort(key=lambda row: -sum(document.length for document in row))
        micros, start = [], 0
        while start < len(rows):
            width = sum(document.length for document in rows[start])
            stop = start + max(1, self.micro_tokens // width)
            micros.append(self.micro(rows[start:stop], width))
            start = stop
        return micros

    def micro(self, rows: Sequence[Sequence[Document]], width: int) -> Micro:
        """The tensors of some rows, each at most `width` long."""
        shape = (len(rows), width)
        tokens_BT = torch.zeros(shape, dtype=torch.long)
        position_BT = torch.zeros(shape, dtype=torch.long)
        target_BT = torch.zeros(shape, dtype=torch.long)
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        behavior_logp_BT, adv_BT = torch.zeros(shape), torch.zeros(shape)
        for b, row in enumerate(rows):
            t = 0
            for document in row:
                ids = torch.tensor(document.prompt_ids + document.token_ids)
                end = t + len(ids)
                tokens_BT[b, t:end] = ids
                position_BT[b, t:end] = torch.arange(len(ids))
                target_BT[b, t : end - 1] = ids[1:]
                # Position s predicts token s + 1, so the completion's first token is predicted by the prompt's last.
                scored = torch.tensor(document.behavior_logp, dtype=torch.float32)
                first = t + len(document.prompt_ids) - 1
                if not document.prompt_ids:
                    first, scored = t, scored[1:]
                finite = torch.isfinite(scored)
                mask_BT[b, first : end - 1] = finite
                behavior_logp_BT[b, first : end - 1] = torch.where(finite, scored, torch.zeros_like(scored))
                adv_BT[b, first : end - 1] = document.advantage * finite
                t = end
            position_BT[b, t:] = torch.arange(width - t)
        tensors = (tokens_BT, position_BT, target_BT, mask_BT, behavior_logp_BT, adv_BT)
        return Micro(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))

    def empty(self) -> Micro:
        """A micro-batch that trains nothing: it keeps a rank in step with one that has more work."""
        return self.micro([[]], 2)


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


def make_batch(documents: Sequence[Document], packer: Packer, world: World) -> Batch:
    """One optimizer step from this rank's documents: counts over all ranks, and as many micro-batches on each."""
    micros = packer.micros(documents)
    step_tokens = world.sum(sum(document.num_trained for document in documents))
    missing = world.max(len(micros)) - len(micros)
    return Batch(micros=(*micros, *(packer.empty() for _ in range(missing))), step_tokens=step_tokens)


def make_batches(
    groups: Sequence[Group], advantages: Sequence[Sequence[float]], packer: Packer, world: World, *, minibatches: int
) -> list[Batch]:
    """The optimizer steps of one batch of rollouts: whole groups, in order, in `minibatches` nearly equal parts."""
    documents = [
        [document(rollout, advantage) for rollout, advantage in zip(group.rollouts, advantages_G, strict=True)]
        for group, advantages_G in zip(groups, advantages, strict=True)
    ]
    cuts = [len(groups) * i // minibatches for i in range(minibatches + 1)]
    parts = [[one for group in documents[start:stop] for one in group] for start, stop in pairwise(cuts)]
    return [make_batch(part, packer, world) for part in parts]


def document(rollout: Rollout, advantage: float) -> Document:
    """A rollout as something to train on; one that could not be judged keeps its place with no trained token."""
    unjudged = rollout.reward is None
    return Document(
        prompt_ids=rollout.prompt_ids,
        token_ids=rollout.token_ids,
        behavior_logp=(math.nan,) * len(rollout.token_ids) if unjudged else rollout.behavior_logp,
        advantage=0.0 if unjudged else advantage,
    )
