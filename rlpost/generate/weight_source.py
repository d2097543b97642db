"""The policy's weights for vLLM's own weight-transfer engines: what streams into a local generator, as a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer import ParamMeta, WeightSource

from rlpost.weights import WeightStream


class PolicySource(WeightSource):
    """Fed by a `WeightStream`: give it to `WeightTransferTrainerFactory.trainer_init` on every rank.

    Each pass gathers anew, so every round sends the weights as they are then. All ranks iterate it, whether they send
    or not; an engine that stops early on one rank leaves no other waiting.
    """

    def __init__(self, stream: WeightStream) -> None:
        self.stream = stream

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of every weight, from the sharded shapes; nothing is gathered."""
        return [ParamMeta(*meta) for meta in self.stream.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.stream)
