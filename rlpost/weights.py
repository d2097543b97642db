"""Trainer -> generator: the policy's weights as a stream of (Hugging Face name, whole tensor).

Under ZeRO-3 parameters are gathered a bucket at a time, on every rank in the same order, and cloned before they leave
the gather: a generator may hold on to a tensor until the rest of its layer has arrived. Of a policy with adapters,
merged weights are made on the way, and neither the frozen ones nor the adapters are touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlpost.adapter import LowRank, base_weights, dense

PREFIX = "model."
"""What `Policy` adds in front of the Hugging Face names."""


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of the stream, and the adapter that is merged into it.

    >>> import torch
    >>> Part("norm.weight", torch.ones(2), None).whole()
    tensor([1., 1.])
    """

    name: str
    param: Any
    low_rank: LowRank | None

    @property
    def params(self) -> list[Any]:
        """Everything that must be gathered for it."""
        return [self.param, *([self.low_rank.a, self.low_rank.b] if self.low_rank else [])]

    @property
    def num_bytes(self) -> int:
        """What it takes to gather it."""
        return sum(getattr(param, "ds_numel", param.numel()) * param.element_size() for param in self.params)

    def whole(self) -> Tensor:
        """The weight that a generator wants; where there is nothing to merge, the parameter itself."""
        weight = dense(self.param)
        return weight if self.low_rank is None else self.low_rank.added_to(weight)


class WeightStream:
    """One pass over the weights; iterate it to the end on every rank. Counts what went through."""

    def __init__(self, policy: nn.Module, *, bucket_bytes: int) -> None:
        self.policy, self.bucket_bytes = policy, bucket_bytes
        self.num_bytes = 0
        self.num_tensors = 0
        self.done = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors in the order of the module tree; a tied weight comes once, under its first name."""
        for bucket in self._buckets():
            yield from self._gathered(bucket)
        self.done = True

    def _buckets(self) -> Iterator[list[Part]]:
        bucket: list[Part] = []
        size = 0
        for name, param, low_rank in base_weights(self.policy):
            if not name.startswith(PREFIX):
                continue
            part = Part(name.removeprefix(PREFIX), param, low_rank)
            if bucket and size + part.num_bytes > self.bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(part)
            size += part.num_bytes
        if bucket:
            yield bucket

    def _gathered(self, bucket: list[Part]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _sharded(bucket) if hasattr(bucket[0].param, "ds_id") else _plain(bucket):
            self.num_bytes += tensor.numel() * tensor.element_size()
            self.num_tensors += 1
            yield name, tensor


def _plain(bucket: list[Part]) -> Iterator[tuple[str, Tensor]]:
    return ((part.name, part.whole()) for part in bucket)


def _sharded(bucket: list[Part]) -> Iterator[tuple[str, Tensor]]:
    from deepspeed import zero

    with zero.GatheredParameters([param for part in bucket for param in part.params]):
        whole = [(part.name, part.whole() if part.low_rank else part.whole().clone()) for part in bucket]
    return iter(whole)
