"""One optimizer step, the same for the policy, for a critic, and for supervised training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from rlpost.metrics import Metrics
from rlpost.types import Batch, Micro

LossOf = Callable[[Micro], tuple[Tensor, dict[str, Tensor]]]
"""Micro-batch -> its share of the loss of the optimizer step (`losses.weighted_sum`), and per-token figures to log."""


class Trainable(Protocol):
    """What an optimizer step needs of an engine."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient to that of the optimizer step in progress."""

    def step(self) -> float:
        """Take the optimizer step, and return the gradient's norm."""


def update(engine: Trainable, batch: Batch, loss_of: LossOf, metrics: Metrics) -> float:
    """Add up the gradients of the batch's micro-batches, take one optimizer step, and return the gradient's norm."""
    for micro in batch.micros:
        loss, logged = loss_of(micro)
        engine.backward(loss)
        metrics.tokens(micro.mask_BT & ~micro.off_policy_BT, **logged)
    return engine.step()
