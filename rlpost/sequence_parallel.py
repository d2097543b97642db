"""Long rows cut into columns over neighbouring ranks: DeepSpeed's Ulysses sequence parallelism, arXiv:2309.14509.

`size` neighbouring ranks are a group that holds the same rows `[B, T]`; each of them computes `T / size` positions. For
attention they trade these for all positions of `heads / size` heads, and back. Log-probs and values are put together
again, so that every rank of a group has the loss of whole rows, and the gradient of its own columns: summed over all
ranks that is the gradient of the step, with no factor, whether a loss looks at tokens or at sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlpost.errors import RunError
from rlpost.world import Ranks, World

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Columns:
    """What this rank computes of each row: the `rank`-th of `size` equal parts.

    >>> Columns(rank=1, size=2).own(torch.tensor([[5, 6, 7]])).tolist()
    [[7, 0]]
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group of the ranks that share a row."""

    def own(self, x_BT: Tensor) -> Tensor:
        """This rank's columns `[B, ceil(T / size)]`; zeros fill up the last rank's."""
        if self.size == 1:
            return x_BT
        width = -(-x_BT.shape[1] // self.size)
        full_BT = nn.functional.pad(x_BT, (0, width * self.size - x_BT.shape[1]))
        return full_BT[:, self.rank * width : (self.rank + 1) * width].contiguous()

    def whole(self, x_Bt: Tensor, width: int) -> Tensor:
        """All ranks' columns `[B, width]`, on every rank; its gradient is kept where the columns are one's own."""
        return x_Bt if self.size == 1 else _Whole.apply(x_Bt, self)[:, :width]

    def seen(self, position_BT: Tensor, seen_BTT: Tensor | None) -> Tensor:
        """Which positions of the filled-up row each one may look at; without `seen_BTT`, as `position_BT` says."""
        length = position_BT.shape[1]
        if seen_BTT is None:
            document_BT = (position_BT == 0).cumsum(1)
            seen_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
        filling = -length % self.size
        itself_TT = torch.eye(length + filling, dtype=torch.bool, device=position_BT.device)
        return nn.functional.pad(seen_BTT, (0, filling, 0, filling)) | itself_TT

    def together(self, items: Sequence[T]) -> tuple[list[T], slice]:
        """The items of all ranks of the group, in the order of ranks, and where one's own are."""
        if self.size == 1:
            return list(items), slice(None)
        shares: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(shares, list(items), group=self.group)
        start = sum(map(len, shares[: self.rank]))
        return [item for share in shares for item in share], slice(start, start + len(items))

    def groups(self, world: Ranks) -> Ranks:
        """The groups of all ranks, each as one rank."""
        return world if self.size == 1 else _Groups(world, self.size)


WHOLE = Columns()


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Bt: Tensor, columns: Columns) -> Tensor:
        ctx.rank, ctx.width = columns.rank, x_Bt.shape[1]
        parts = [torch.empty_like(x_Bt, memory_format=torch.contiguous_format) for _ in range(columns.size)]
        dist.all_gather(parts, x_Bt.contiguous(), group=columns.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        return grad_BT[:, ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width], None


class _Groups:
    """Groups of `span` ranks as the ranks of a world: what all ranks of a group hold alike counts once."""

    def __init__(self, world: Ranks, span: int) -> None:
        self.world, self.span = world, span
        self.rank, self.size = world.rank // span, world.size // span

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every group's `item`, in the order of groups, on every rank."""
        return self.world.all_gather_object(item)[:: self.span]

    def max(self, value: int) -> int:
        """The largest of an integer over all groups."""
        return self.world.max(value)


def columns_of(size: int, world: World) -> Columns:
    """This rank's columns where `size` ranks share a row; every rank calls it."""
    return WHOLE if size == 1 else Columns(world.rank % size, size, world.neighbours(size))


def in_columns(transformer: Any, columns: Columns, inputs: dict[str, Any]) -> Any:
    """The transformer's output for this rank's columns of rows, whose attention sees all of them.

    `inputs` holds the columns, and under `attention_mask` what each position of the whole rows may look at. DeepSpeed's
    own `register_with_transformers` drops such a mask, and with it the borders of packed documents; so its exchange is
    called here, with the mask.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface

    config = transformer.config.get_text_config()
    name = transformer.config._attn_implementation
    known = AttentionInterface()
    plain = known[name]
    if not isinstance(plain, _Exchanging):
        AttentionInterface.register(name, _Exchanging(plain))
    else:
        plain = plain.plain
    ulysses = UlyssesSPAttentionHF(
        attn=plain,
        batch_size=inputs["input_ids"].shape[0],
        attn_head_count=config.num_attention_heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=columns.group,
        seq_length_is_variable=True,
    )
    output = transformer(**inputs, ulysses=ulysses)
    if ulysses.local_seq_length is None:
        raise RunError(
            "engine.sequence_parallel must be 1 for a model whose attention does not go through transformers' "
            f"attention functions (got {columns.size} and {type(transformer).__name__}): set it to 1"
        )
    return output


class _Exchanging:
    """An attention function of transformers that goes through the exchange where a call brings one.

    It stands in the place of the plain one, under its name, since transformers looks at that name in many places.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self, *args: Any, ulysses: Any = None, **options: Any) -> Any:
        """What the plain function returns, of all positions in place of this rank's where `ulysses` exchanges them."""
        return (ulysses or self.plain)(*args, **options)
