"""One optimizer step, the same for reinforcement learning and for supervised training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlpost.engine import Engine
from rlpost.losses import reduce_tokens
from rlpost.metrics import Metrics
from rlpost.types import Batch, Micro

LossOf = Callable[[Micro, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, logp [B, T]) -> loss of each token [B, T], and per-token figures to log."""


def update(engine: Engine, batch: Batch, loss_of: LossOf, metrics: Metrics) -> None:
    """Add up the gradients of the batch's micro-batches and take one optimizer step."""
    for micro in batch.micros:
        logp_BT, entropy_BT = engine.token_logp(micro)
        loss_BT, logged = loss_of(micro, logp_BT)
        engine.backward(reduce_tokens(loss_BT, micro.mask_BT, batch.step_tokens, engine.world.size))
        metrics.tokens(micro.mask_BT, **{"policy/entropy": entropy_BT, "policy/loss": loss_BT}, **logged)
    metrics.mean("optim/grad_norm", engine.step())
