"""Weights through a file in shared memory: an engine of vLLM's weight transfer, for servers on the trainer's node.

The trainer writes all weights one after another into a file below /dev/shm, once a node; every worker of every server
there maps it, compares its checksum with the trainer's, and copies from it. It needs no GPU. vLLM learns of it through
the entry point `vllm.general_plugins`, which each of its processes reads.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightSource, WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlpost.generate.local_vllm import repack_head
from rlpost.generate.vllm_features import loads_in_place

BACKEND = "rlpost_shm"
SHM = Path("/dev/shm")
PREFIX = "rlpost-weights-"
SUPERVISED = "RLPOST_SUPERVISED"
"""Set where a server is a child of `rlpost serve`, and must not outlive it."""
ALIGNED, CHUNK = 64, 1 << 20
"""Bytes: where each tensor begins, and what one word of a checksum speaks of."""
PR_SET_PDEATHSIG = 1


def register() -> None:
    """The plug-in: make the engine known to this process of vLLM, and let a supervised one die with its parent."""
    if os.environ.get(SUPERVISED):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "ShmEngine")
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, __name__, "ShmTrainer")


@dataclass
class ShmInit(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update.

    >>> ShmInit()
    ShmInit()
    """


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    """Where a set of weights lies, and what it must be.

    >>> ShmUpdate("/dev/shm/w", ["a", "b"], ["float32", "bfloat16"], [[3], [2, 2]], "").offsets()
    ([0, 64], 128)
    """

    path: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    checksum: str

    def offsets(self) -> tuple[list[int], int]:
        """Where each tensor begins, and the length of all, in bytes."""
        starts, end = [], 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            starts.append(end)
            size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            end += (size + ALIGNED - 1) // ALIGNED * ALIGNED
        return starts, end

    def tensors(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each weight as a view of the bytes."""
        for name, dtype, shape, start in zip(self.names, self.dtypes, self.shapes, self.offsets()[0], strict=True):
            kind: torch.dtype = getattr(torch, dtype)
            size = torch.Size(shape).numel() * kind.itemsize
            yield name, buffer[start : start + size].view(kind).view(shape)

    def sum_of(self, buffer: Tensor) -> str:
        """A checksum of names, types, shapes and bytes, at the speed of memory: sums of 64-bit words, then SHA-256."""
        words = buffer.view(torch.int64)
        per_chunk = CHUNK // 8
        whole = len(words) // per_chunk * per_chunk
        sums = [*words[:whole].view(-1, per_chunk).sum(1).tolist(), int(words[whole:].sum())]
        head = json.dumps([self.names, self.dtypes, self.shapes, sums])
        return hashlib.sha256(head.encode()).hexdigest()


class ShmEngine(WeightTransferEngine[ShmInit, ShmUpdate]):
    """The side of a server's worker."""

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        """All weights come in one update, which begins and ends by itself."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, which waits for an accelerator where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ShmUpdate) -> None:
        """Map the file, compare its checksum, and load from it."""
        with open(update_info.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)  # populated, it would be a copy
        buffer = torch.frombuffer(mapped, dtype=torch.uint8)
        if (found := update_info.sum_of(buffer)) != update_info.checksum:
            raise ValueError(f"checksum of {update_info.path} must be {update_info.checksum} (got {found})")
        worker = SimpleNamespace(
            vllm_config=self.vllm_config, model_runner=SimpleNamespace(get_model=lambda: self.model)
        )
        with torch.no_grad():
            if loads_in_place(worker):
                self.model.load_weights(update_info.tensors(buffer))  # type: ignore[operator]
            else:
                self._reload(update_info.tensors(buffer))
            repack_head(worker)

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        self.model.load_weights(weights)  # type: ignore[operator]
        finalize_layerwise_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        """The update has ended by itself."""

    def shutdown(self) -> None:
        """Nothing is held."""


@dataclass
class ShmTrainerInit(TrainerInitInfo):
    """Who writes, and under which name."""

    backend: ClassVar[str] = BACKEND

    run: str
    """Names this run's files apart from those of others."""
    writes: bool
    """Whether this rank writes for its node."""


class ShmTrainer(TrainerWeightTransferEngine[ShmTrainerInit]):
    """The trainer's side. The newest set stays until the run ends: a server that comes back can be given it."""

    init_info_cls = ShmTrainerInit

    def __init__(self, init: ShmTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None) -> None:
        super().__init__(client=client, source=source, is_sender=init.is_sender)
        self.run, self.writes = init.run, init.writes
        self._held: tuple[Path, int, Tensor] | None = None

    @classmethod
    def trainer_init(
        cls, init_info: ShmTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> ShmTrainer:
        """No rendezvous; files that a killed run has left are removed."""
        if init_info.writes:
            remove_left_over()
        return cls(init_info, client=client, source=source)

    def send_weights(self) -> None:
        """A whole round, as vLLM has it: write, then let every server behind the client load."""
        update = self.publish()
        if self.is_sender:
            assert update is not None, "the rank that sends must be one that writes"
            self.client.start_weight_update()
            self.client.update_weights(update)
            self.client.finish_weight_update()

    def publish(self) -> dict[str, Any] | None:
        """Write the weights as they are now, on every rank in step; what servers must be told, of a rank that writes.

        They go over those before them. A server that is just taking these in sees it by the checksum, and is told anew.
        """
        assert self.source is not None
        if not self.writes:
            for _ in self.source:
                pass
            return None
        meta = self.source.metadata()
        path = SHM / f"{PREFIX}{self.run}-{os.getpid()}"
        dtypes = [str(one.dtype).removeprefix("torch.") for one in meta]
        update = ShmUpdate(str(path), [one.name for one in meta], dtypes, [list(one.shape) for one in meta], "")
        buffer = self._buffer(path, update.offsets()[1])
        places = update.tensors(buffer)
        with torch.no_grad():
            for (name, place), (given, tensor) in zip(places, self.source, strict=True):
                assert name == given, (name, given)
                place.copy_(tensor)
        update.checksum = update.sum_of(buffer)
        return asdict(update)

    def _buffer(self, path: Path, size: int) -> Tensor:
        if self._held is None or len(self._held[2]) != size:
            self.remove()
            self._held = path, *_create(path, size)
        return self._held[2]

    def remove(self) -> None:
        """Remove the newest set."""
        if self._held is not None:
            path, handle, _ = self._held
            path.unlink(missing_ok=True)
            os.close(handle)
            self._held = None

    def shutdown(self) -> None:
        """Leave nothing behind."""
        self.remove()


def _create(path: Path, size: int) -> tuple[int, Tensor]:
    """A new file of zeros, locked for as long as its writer lives, and its bytes."""
    new = path.with_name(f"new-{path.name}")  # which nobody takes for left over before it is locked
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    new.rename(path)
    os.posix_fallocate(handle, 0, size)  # a full /dev/shm is an error here, and not a signal later
    return handle, torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)


def remove_left_over(names: Sequence[Path] | None = None) -> None:
    """Remove files whose writer has died without doing so: nobody holds their lock."""
    for path in SHM.glob(f"{PREFIX}*") if names is None else names:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)
