"""Trainer -> generator: the policy's weights as a stream of (Hugging Face name, whole tensor).

Under ZeRO-3 parameters are gathered a bucket at a time, on every rank in the same order, and cloned before they leave
the gather: a generator may hold on to a tensor until the rest of its layer has arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

PREFIX = "model."
"""What `Policy` adds in front of the Hugging Face names."""


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

    def _buckets(self) -> Iterator[list[tuple[str, Any]]]:
        bucket: list[tuple[str, Any]] = []
        size = 0
        for name, param in self.policy.named_parameters():
            if not name.startswith(PREFIX):
                continue
            num_bytes = getattr(param, "ds_numel", param.numel()) * param.element_size()
            if bucket and size + num_bytes > self.bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append((name.removeprefix(PREFIX), param))
            size += num_bytes
        if bucket:
            yield bucket

    def _gathered(self, bucket: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        if any(hasattr(param, "ds_id") for _, param in bucket):
            from deepspeed import zero

            with zero.GatheredParameters([param for _, param in bucket]):
                whole = [(name, param.detach().clone()) for name, param in bucket]
        else:
            whole = [(name, param.detach()) for name, param in bucket]
        for name, tensor in whole:
            self.num_bytes += tensor.numel() * tensor.element_size()
            self.num_tensors += 1
            yield name, tensor
