"""Trainer -> generator: the policy's weights as a stream of (Hugging Face name, whole tensor).

Under ZeRO-3 whole weights are made from DeepSpeed's shards a bucket at a time, on every rank in the same order. The
next bucket is on its way while the last one is used: two are alive at most. DeepSpeed's own parameters stay as they
are, and a generator may hold on to a tensor until the rest of its layer has arrived. Of a policy with adapters, merged
weights are made on the way, and neither the frozen ones nor the adapters are touched.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlpost.adapter import base_weights, dense, low_rank
from rlpost.errors import RunError

Weights = Generator[tuple[str, Tensor], None, None]
"""Names and whole tensors; closed early, it still takes part in the gathers of the other ranks."""
PREFIX = "model."
"""What `Policy` adds in front of the Hugging Face names."""


class WeightMeta(NamedTuple):
    """One tensor of the stream before it is there.

    >>> WeightMeta("norm.weight", torch.bfloat16, (576,)).shape
    (576,)
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of the stream, and the layer whose adapter is merged into it.

    >>> part = Part("norm.weight", torch.ones(2), None)
    >>> part.merged(part.params)
    tensor([1., 1.])
    """

    name: str
    param: Any
    layer: Any

    @property
    def params(self) -> list[Any]:
        """Everything that must be gathered for it: the weight, then A and B of its adapter."""
        if self.layer is None:
            return [self.param]
        pair = low_rank(self.layer)
        return [self.param, pair.a, pair.b]

    @property
    def num_bytes(self) -> int:
        """What it takes to gather it."""
        return sum(getattr(param, "ds_numel", param.numel()) * param.element_size() for param in self.params)

    @property
    def meta(self) -> WeightMeta:
        """What a generator will get, from what is known without a gather."""
        held = getattr(self.param, "quant_state", self.param)  # 4-bit weights are streamed as numbers
        return WeightMeta(self.name, held.dtype, tuple(getattr(self.param, "ds_shape", held.shape)))

    def merged(self, whole: Sequence[Tensor]) -> Tensor:
        """The weight that a generator wants, from the whole `params`; with nothing to merge, the parameter itself."""
        weight = dense(whole[0])
        if self.layer is None:
            return weight
        return replace(low_rank(self.layer), a=whole[1], b=whole[2]).added_to(weight)  # its scaling as it is now


class WeightStream:
    """The weights of a policy, as often as it is iterated, each time on every rank and to the end.

    Names, shapes and buckets are found once; keep it for the next sync. A rank that stops early still takes part in the
    gathers that the others wait for. `num_bytes`, `num_tensors` and `done` speak of the last pass.
    """

    def __init__(self, policy: nn.Module, *, bucket_bytes: int) -> None:
        self.policy = policy
        self.buckets = list(_buckets(policy, bucket_bytes))
        self.num_bytes = 0
        self.num_tensors = 0
        self.done = False

    def metadata(self) -> list[WeightMeta]:
        """Name, dtype and whole shape of all that is streamed, in its order; nothing is gathered."""
        return [part.meta for bucket in self.buckets for part in bucket]

    def __iter__(self) -> Weights:
        """Names and tensors in the order of the module tree; a tied weight comes once, under its first name."""
        self.num_bytes, self.num_tensors, self.done = 0, 0, False
        sharded = bool(self.buckets) and hasattr(self.buckets[0][0].param, "ds_id")
        yield from self._counted(_sharded(self.buckets) if sharded else _plain(self.buckets))
        self.done = True

    def _counted(self, weights: Weights) -> Weights:
        with closing(weights):
            for name, tensor in weights:
                self.num_bytes += tensor.numel() * tensor.element_size()
                self.num_tensors += 1
                yield name, tensor


def _buckets(policy: nn.Module, bucket_bytes: int) -> Iterator[list[Part]]:
    bucket: list[Part] = []
    size = 0
    for name, param, layer in base_weights(policy):
        if not name.startswith(PREFIX):
            continue
        part = Part(name.removeprefix(PREFIX), param, layer)
        if bucket and size + part.num_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(part)
        size += part.num_bytes
    if bucket:
        yield bucket


def _plain(buckets: Sequence[list[Part]]) -> Weights:
    return ((part.name, part.merged(part.params)) for bucket in buckets for part in bucket)


def _sharded(buckets: Sequence[list[Part]]) -> Weights:
    waiting = iter(buckets)
    ahead: _Gather | None = _Gather(next(waiting))
    stopped = False
    while ahead is not None:
        gathered = ahead.wait()
        following = next(waiting, None)
        ahead = None if following is None else _Gather(following)
        try:
            while gathered and not stopped:
                part, whole = gathered.pop(0)
                weight = part.merged(whole)
                del whole
                yield part.name, weight
                del weight
        except GeneratorExit:
            stopped = True  # the other ranks go on, and wait for this one's shards
        del gathered


class _Gather:
    """A bucket on its way: one collective a parameter, all of them started."""

    def __init__(self, bucket: list[Part]) -> None:
        self._started = [(part, [_start(param) for param in part.params]) for part in bucket]

    def wait(self) -> list[tuple[Part, list[Tensor]]]:
        """Its parts, each with its whole parameters."""
        whole = []
        for part, started in self._started:
            for _, handle in started:
                if handle is not None:
                    handle.wait()
            whole.append((part, [tensor for tensor, _ in started]))
        self._started = []
        return whole


def _start(param: Any) -> tuple[Tensor, Any]:
    """A whole parameter, right once the handle has been waited for, from shards of ceil(numel / ranks) numbers."""
    from torch import distributed

    shard, group = param.ds_tensor.detach(), param.ds_process_group
    num_ranks = distributed.get_world_size(group)
    if shard.dtype != param.dtype or shard.numel() * num_ranks < param.ds_numel:
        raise RunError(
            "engine.deepspeed: the shards of the weights must be in memory and not quantized, so that a generator can "
            f"be given them (one has {shard.numel()} of {param.ds_numel} numbers as {shard.dtype}): take out "
            "zero_quantized_nontrainable_weights and offload_param to nvme"
        )
    flat, handle = shard, None
    if num_ranks > 1:
        flat = torch.empty(shard.numel() * num_ranks, dtype=shard.dtype, device=param.device)
        handle = distributed.all_gather_single(flat, shard.to(param.device), group=group, async_op=True)
    return flat[: param.ds_numel].view(param.ds_shape), handle
