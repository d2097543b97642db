"""Documents -> rows without padding between them; rows of similar length share a micro-batch.

The positions left over at a row's end form one more document that nothing is trained on. Documents with one prompt can
stand behind a single copy of it, where that costs less: attention then follows a mask instead of positions.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlpost.balance import cost
from rlpost.check_parallel import split_problems
from rlpost.document import Document, block_length, places, span, values_of
from rlpost.errors import RunError
from rlpost.flops import causal_pairs
from rlpost.recipe import Recipe
from rlpost.sequence_parallel import WHOLE, Columns, columns_of
from rlpost.types import Micro
from rlpost.world import World

DENSE_ROW_TOKENS = 512
"""Row length where attention pays for its square: long enough to amortise, short enough not to waste."""
NARROW_ROWS = (256, 128, 64)
"""What is tried below it: the narrower the model, the sooner attention over a whole row costs more than it saves."""

Block = tuple[int, ...]
"""Indices of documents: one, or several that share their prompt."""
Layout = list[list[list[Block]]]
"""Micro-batches of rows of blocks."""


@dataclass(frozen=True, slots=True)
class Packer:
    """How many positions a row and a micro-batch may have, and where the tensors go."""

    micro_tokens: int
    row_tokens: int
    device: torch.device
    _: KW_ONLY
    hidden_size: int = 1024
    """Width of the model: it says from what length on attention is what a row costs."""
    share_prompts: bool = False
    """Whether documents may leave their prompt to one copy for several; attention must take a mask."""
    narrow_rows: bool = False
    """Whether rows may have fewer positions than `row_tokens`, where that costs less."""
    columns: Columns = WHOLE
    """Ranks that share rows share their documents too."""

    def layout(self, documents: Sequence[Document]) -> Layout:
        """Where each document goes: in wide rows or narrow ones, prompts shared or not, as costs least."""
        widths = [self.row_tokens, *(width for width in NARROW_ROWS if self.narrow_rows and width < self.row_tokens)]
        alone = [(i,) for i in range(len(documents))]
        layouts = [self._layout(documents, alone, width) for width in widths]
        if self.share_prompts:
            layouts += [self._layout(documents, shared_blocks(documents, width), width) for width in widths]
        if len(layouts) == 1:
            return layouts[0]
        return min(layouts, key=lambda layout: self._cost(documents, layout))

    def micros(self, documents: Sequence[Document]) -> list[Micro]:
        """This rank's documents as micro-batches of packed rows, longest rows first."""
        return [self.micro_of_blocks(with_documents(rows, documents)) for rows in self.layout(documents)]

    def micro(self, rows: Sequence[Sequence[Document]], width: int = 0) -> Micro:
        """The tensors of some rows, as wide as the longest, or as `width`; every document with its own prompt."""
        return self.micro_of_blocks([[[document] for document in row] for row in rows], width)

    def micro_of_blocks(self, rows: Sequence[Sequence[Sequence[Document]]], width: int = 0) -> Micro:
        """The tensors of some rows of blocks; the documents of a block of several share one copy of their prompt."""
        width = max(width, *(sum(map(block_length, row)) for row in rows))
        scores = sorted({name for row in rows for block in row for document in block for name in document.scores})
        page = _Page((len(rows), width), ("behavior_logp", "advantage", "weight", "imitation_weight", *scores))
        for b, row in enumerate(rows):
            start = 0
            for block in row:
                page.write(b, start, block)
                start += block_length(block)
            page.position_BT[b, start:] = torch.arange(width - start)
        return page.micro(self.device, scores)

    def empty(self, scores: Sequence[str] = ()) -> Micro:
        """A micro-batch that trains nothing: it keeps a rank in step with one that has more work."""
        nothing = {name: torch.zeros(0) for name in scores}
        return self.micro([[Document((0,), (), (), scores=nothing)]], 2)

    def _layout(self, documents: Sequence[Document], blocks: Sequence[Block], row_tokens: int) -> Layout:
        lengths = [block_length([documents[i] for i in block]) for block in blocks]
        rows = pack(lengths, row_tokens)
        rows.sort(key=lambda row: -sum(lengths[i] for i in row))
        widths = [sum(lengths[i] for i in row) for row in rows]
        micros, start = [], 0
        while start < len(rows):
            stop = start + max(1, self.micro_tokens // widths[start])
            if self.narrow_rows:  # a few long documents, alone in their rows, widen none of the others
                stop = next((i for i in range(start, stop) if i < len(rows) and 2 * widths[i] < widths[start]), stop)
            micros.append([[blocks[i] for i in row] for row in rows[start:stop]])
            start = stop
        return micros

    def _cost(self, documents: Sequence[Document], layout: Layout) -> float:
        """Work of the forward passes: every row of a micro-batch is as wide as its first, and attention is dense."""
        placed = [with_documents(rows, documents) for rows in layout]
        widths = [sum(map(block_length, rows[0])) for rows in placed]
        return sum(len(rows) * cost(2 * width, self.hidden_size) for rows, width in zip(placed, widths, strict=True))


class _Page:
    """The tensors of a micro-batch while documents are written into them."""

    def __init__(self, shape: tuple[int, int], names: Sequence[str]) -> None:
        self.tokens_BT, self.position_BT, self.target_BT, self.version_BT = torch.zeros(4, *shape, dtype=torch.long)
        self.document_BT, self.prefix_BT = torch.full((2, *shape), -1)
        self.mask_BT, self.off_policy_BT = torch.zeros(2, *shape, dtype=torch.bool)
        self.trained: dict[str, Tensor] = {name: torch.zeros(shape) for name in names}
        self.num_documents = 0
        self.num_prefixes = 0
        self.num_tokens, self.num_positions, self.num_pairs = 0, 0, 0
        """As in `Micro`, of documents that have an answer."""

    def write(self, b: int, start: int, block: Sequence[Document]) -> None:
        """Write a block into row `b`, from position `start` on."""
        end = start + block_length(block)
        if len(block) > 1:
            prefix = torch.tensor(block[0].prompt_ids[:-1], dtype=torch.long)
            self.tokens_BT[b, start : start + len(prefix)] = prefix
            self.position_BT[b, start : start + len(prefix)] = torch.arange(len(prefix))
            self.prefix_BT[b, start:end] = self.num_prefixes
            self.num_positions += len(prefix)
            self.num_pairs += causal_pairs([len(prefix)])
            self.num_prefixes += 1
        for document, begin, own in places(block, start):
            self._write_document(b, document, begin, own)

    def _write_document(self, b: int, document: Document, begin: int, own: int) -> None:
        ids = torch.tensor(document.prompt_ids + document.token_ids, dtype=torch.long)
        end, skipped = begin + len(ids), own - begin
        self.tokens_BT[b, own:end] = ids[skipped:]
        self.position_BT[b, own:end] = torch.arange(skipped, len(ids))
        self.target_BT[b, own : end - 1] = ids[skipped + 1 :]
        self.version_BT[b, own:end] = document.version
        for first, version in document.later_versions:  # a position speaks of the token that follows
            self.version_BT[b, end - len(document.token_ids) - 1 + first : end] = version
        self.off_policy_BT[b, own:end] = document.off_policy
        self.document_BT[b, own:end] = self.num_documents
        self.num_documents += 1
        if document.token_ids:
            self.num_tokens += len(ids)
            self.num_positions += end - own
            self.num_pairs += causal_pairs([len(ids)]) - causal_pairs([skipped])
        place, tokens = span(document, begin)
        kept = torch.tensor(document.trained[tokens], dtype=torch.bool)
        self.mask_BT[b, place] = kept
        for name, x_BT in self.trained.items():
            values = values_of(document, name)[tokens]
            x_BT[b, place] = torch.where(kept, values, torch.zeros_like(values))

    def micro(self, device: torch.device, scores: Sequence[str]) -> Micro:
        """What was written, on the device."""

        def there(x_BT: Tensor) -> Tensor:
            return x_BT.to(device, non_blocking=True)

        return Micro(
            tokens_BT=there(self.tokens_BT),
            position_BT=there(self.position_BT),
            target_BT=there(self.target_BT),
            mask_BT=there(self.mask_BT),
            behavior_logp_BT=there(self.trained["behavior_logp"]),
            adv_BT=there(self.trained["advantage"]),
            document_BT=there(self.document_BT),
            weight_BT=there(self.trained["weight"]),
            imitation_weight_BT=there(self.trained["imitation_weight"]),
            version_BT=there(self.version_BT),
            off_policy_BT=there(self.off_policy_BT),
            prefix_BT=there(self.prefix_BT),
            shares_prompts=self.num_prefixes > 0,
            has_off_policy=bool(self.off_policy_BT.any()),
            num_trained=int(self.mask_BT.sum()),
            num_tokens=self.num_tokens,
            num_positions=self.num_positions,
            num_pairs=self.num_pairs,
            scores={name: there(self.trained[name]) for name in scores},
        )


def with_documents(rows: Sequence[Sequence[Block]], documents: Sequence[Document]) -> list[list[list[Document]]]:
    """Rows of blocks of documents, from those of their indices."""
    return [[[documents[i] for i in block] for block in row] for row in rows]


def shared_blocks(documents: Sequence[Document], capacity: int) -> list[Block]:
    """Documents with equal prompts together, as many in a block as fit into `capacity`.

    >>> one, other = (Document(prompt, (1,), (0.0,)) for prompt in ((5, 6, 7), (8, 9)))
    >>> shared_blocks([one, other, one, one], capacity=7)      # 5 6 | 7 1 | 7 1, and one more would not fit
    [(0, 2), (3,), (1,)]
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, document in enumerate(documents):
        by_prompt.setdefault(document.prompt_ids, []).append(i)
    blocks: list[Block] = []
    for prompt_ids, members in by_prompt.items():
        block: Block = ()
        for i in members:
            fits = block_length([documents[j] for j in (*block, i)]) <= capacity
            if block and not (fits and prompt_ids):
                blocks.append(block)
                block = ()
            block = (*block, i)
        blocks.append(block)
    return blocks


def make_packer(recipe: Recipe, world: World, model: Path) -> Packer:
    """The packer of a recipe and its model's folder."""
    from rlpost.model_source import hidden_size, looks_at_everything, text_config
    from rlpost.policy import uses_flash_attention

    if problems := split_problems(text_config(model), recipe.engine.sequence_parallel):
        raise RunError("\n".join(problems))
    # Flash attention takes positions and no mask.
    masked = not uses_flash_attention(recipe.model) and looks_at_everything(model)
    return Packer(
        recipe.batch.micro_tokens,
        row_tokens_of(recipe),
        world.device,
        hidden_size=hidden_size(model),
        share_prompts=recipe.batch.share_prompts and masked,
        narrow_rows=recipe.batch.row_tokens is None and not uses_flash_attention(recipe.model),
        columns=columns_of(recipe.engine.sequence_parallel, world),
    )


def row_tokens_of(recipe: Recipe) -> int:
    """Positions of a row: a whole micro-batch with flash attention, short ones without."""
    from rlpost.policy import uses_flash_attention

    row_tokens = recipe.batch.row_tokens
    if row_tokens is None:
        # Flash attention's variable-length call takes one row; a batch of rows would be padded again.
        row_tokens = recipe.batch.micro_tokens if uses_flash_attention(recipe.model) else DENSE_ROW_TOKENS
    return min(row_tokens, recipe.batch.micro_tokens)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of the documents of each row; one longer than `capacity` has a row for itself.

    >>> pack([3, 5, 4, 2], capacity=7)
    [[1, 3], [2, 0]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[i], 0))
        if at == len(free):
            rows.append([])
            room, row = max(capacity, lengths[i]), len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row].append(i)
        insort(free, (room - lengths[i], row))
    return rows
