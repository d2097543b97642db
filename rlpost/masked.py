"""Arithmetic over the trained positions of packed micro-batches. Pure functions on tensors.

`mask_BT` is True where a token is trained. `document_BT` (int64) is the index of the sequence that a position belongs
to, unique within the micro-batch and below B * T; -1 outside every sequence. A sequence lies whole in one micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def blank(mask_BT: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with 0 wherever `mask_BT` is False, and with no gradient from there.

    Done before any arithmetic: 0 * inf is NaN, and a mask applied to the result stops the value but not the gradient.

    >>> blank(torch.tensor([True, False]), torch.tensor([2.0, float("nan")]))
    (tensor([2., 0.]),)
    """
    return tuple(torch.where(mask_BT, x_BT, torch.zeros_like(x_BT)) for x_BT in tensors)


def segment_sum(x_BT: Tensor, document_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum over each sequence's trained positions, at every position of the sequence `[B, T]`; 0 outside.

    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([0, 0, 1, -1]), torch.tensor([True] * 4))
    tensor([3., 3., 4., 0.])
    """
    inside_BT = document_BT >= 0
    (kept_BT,) = blank(mask_BT & inside_BT, x_BT)
    index = document_BT.clamp_min(0).flatten()
    totals = kept_BT.new_zeros(index.numel()).index_add(0, index, kept_BT.flatten())
    return torch.where(inside_BT, totals[index].view_as(x_BT), torch.zeros_like(x_BT))


def segment_mean(x_BT: Tensor, document_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over each sequence's trained positions, at every position of the sequence; 0 where it has none.

    >>> segment_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), torch.tensor([True, True, False]))
    tensor([1.5000, 1.5000, 0.0000])
    """
    count_BT = segment_sum(torch.ones_like(x_BT), document_BT, mask_BT)
    return segment_sum(x_BT, document_BT, mask_BT) / count_BT.clamp_min(1)
