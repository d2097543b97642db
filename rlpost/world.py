"""The ranks of a run: one process a GPU (or a CPU share), started by `torchrun` or alone.

Every rank runs the same lines and the same number of collectives.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from copy import copy
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from rlpost.errors import Preempted, RunError, SharedError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than any phase in which one rank waits for another, such as the longest answer of a step."""


class Ranks(Protocol):
    """What balance and weights need of ranks, which may be groups of them."""

    rank: int
    size: int

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every rank's `item`, in the order of ranks, on every rank."""

    def max(self, value: int) -> int:
        """The largest of an integer over all ranks."""


class World:
    """This process's place among the ranks, and the few collectives that the training loop uses."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self._neighbours: dict[int, Any] = {}
        self._group: Any = None
        """The process group of the collectives below; None: the one of all ranks."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the person who started the run."""
        return self.rank == 0

    def start(self) -> World:
        """Join the other ranks: NCCL with GPUs, gloo without."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size == 1 and "MASTER_ADDR" not in os.environ:
            alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "RANK": "0", "WORLD_SIZE": "1"}
            os.environ.update(alone, LOCAL_RANK="0")
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return self

    def stop(self) -> None:
        """Leave the process group, so that no rank waits for one that has ended."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self._group)

    def apart(self) -> World:
        """The same ranks with collectives of their own, for a thread beside the loop; every rank calls it."""
        other = copy(self)
        if self.size > 1:
            other._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        return other

    def neighbours(self, size: int) -> Any:
        """The process group of this rank among every `size` neighbouring ranks; every rank calls it."""
        if size not in self._neighbours:
            groups = [dist.new_group(list(range(at, at + size))) for at in range(0, self.size, size)]
            self._neighbours[size] = groups[self.rank // size]
        return self._neighbours[size]

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every rank's `item`, in the order of ranks, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def together(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`; where it fails on one rank, or has to leave, every rank raises that."""
        result: Any = None
        error: RunError | None = None
        try:
            result = work()
        except RunError as failed:
            error = failed
        told = None if error is None else (isinstance(error, Preempted), str(error))
        every_rank = filter(None, self.all_gather_object(told))
        for leaves, message in sorted(every_rank, key=lambda one: one[0]):  # what is broken comes before a leave
            raise (Preempted if leaves else SharedError)(message) from error
        return cast(T, result)

    def sum(self, value: int) -> int:
        """The sum of an integer over all ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """The largest of an integer over all ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def add(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def _reduce(self, value: int, op: dist.ReduceOp.RedOpType) -> int:
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=op, group=self._group)
        return int(box.item())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
