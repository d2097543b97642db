"""Who has the device's memory when: parts of the trainer lie in the host's memory while the generator is awake.

What is parked is storages: their bytes go to the host and the storage shrinks to nothing, so that each tensor that
looks into it, whoever holds it, is as it was once the bytes are back. DeepSpeed has `offload_states` of its own, which
under ZeRO-3 wants its fused Adam, has nothing for stage 0, and knows neither frozen models nor gradients on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlpost.errors import RunError
from rlpost.recipe import Recipe

Park = Literal["none", "optimizer", "all"]
CHUNK_BYTES = 64 << 20
"""Copied at once. Page-locked memory is handed out in powers of two: only the last chunk of a storage wastes any."""


def park_of(recipe: Recipe, *, on_gpu: bool) -> Park:
    """`engine.park`, decided: the optimizer makes room for a vLLM that gives its own memory back while training."""
    if recipe.engine.park is not None:
        return recipe.engine.park
    generator, engine = recipe.generator, recipe.engine
    takes_turns = on_gpu and generator.kind == "local_vllm" and generator.sleep_level > 0
    return "optimizer" if takes_turns and not engine.offload_optimizer else "none"


class Shelf:
    """What a module and its optimizer hold on a device, and a place for it in the host's memory."""

    def __init__(self, module: nn.Module, device: torch.device, *holders: Any) -> None:
        self.module = module
        self._holders = holders
        """Objects among whose attributes the optimizer's tensors are."""
        self._device = device
        self._parked: list[tuple[Any, list[Tensor]]] = []
        self._refusal: Any = None

    def park_optimizer(self) -> None:
        """Take master copies, moments and gradients off the device; not weights, even those the optimizer lists."""
        kept = {storage.data_ptr() for storage in self._storages(self._weights())}
        self._park(self._storages(tensors_in([vars(holder) for holder in self._holders]), kept))

    def park_weights(self) -> None:
        """Take the weights off the device; until they are back a forward pass is refused."""
        self._park(self._storages(self._weights()))
        if self._refusal is None:
            self._refusal = self.module.register_forward_pre_hook(_refuse, prepend=True)

    @torch.no_grad()
    def back(self) -> None:
        """Bring back everything that is parked."""
        for storage, chunks in self._parked:
            storage.resize_(sum(chunk.numel() for chunk in chunks))
            for piece, chunk in zip(_bytes_of(storage), chunks, strict=True):
                piece.copy_(chunk, non_blocking=True)
        self._wait()
        self._parked = []
        if self._refusal is not None:
            self._refusal.remove()
            self._refusal = None

    def _weights(self) -> Iterator[Tensor]:
        for param in self.module.parameters():
            yield param
            if hasattr(param, "ds_tensor"):
                yield param.ds_tensor

    def _storages(self, tensors: Iterable[Tensor], kept: Iterable[int] = ()) -> list[Any]:
        """Each storage on the device once; those of a mapped file, which cannot shrink, only exist on a CPU."""
        found: dict[int, Any] = {}
        for tensor in tensors:
            if tensor.device.type == self._device.type and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.resizable():
                    found[storage.data_ptr()] = storage
        return [storage for pointer, storage in found.items() if pointer not in kept]

    @torch.no_grad()
    def _park(self, storages: Sequence[Any]) -> None:
        self._wait()  # for other streams that still write
        pinned = self._device.type == "cuda"
        for storage in storages:
            chunks = []
            for piece in _bytes_of(storage):
                chunk = torch.empty(piece.numel(), dtype=torch.uint8, device="cpu", pin_memory=pinned)
                chunks.append(chunk.copy_(piece, non_blocking=True))
            self._parked.append((storage, chunks))
        self._wait()
        for storage in storages:
            storage.resize_(0)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Parking:
    """The order of memory around a generator: `making_room`, then it wakes; `policy_was_sent`, then its cache does."""

    def __init__(self, park: Park = "none", policy: Shelf | None = None, others: Sequence[Shelf] = ()) -> None:
        self.park, self.policy, self.others = park, policy, others

    @contextmanager
    def making_room(self) -> Iterator[None]:
        """Park all that a weight sync does not need, and bring it back when the generator has given its memory back."""
        shelves = [*self.others, *([self.policy] if self.policy is not None else [])]
        try:
            for shelf in shelves:
                if self.park != "none":
                    shelf.park_optimizer()
                if self.park == "all" and shelf is not self.policy:
                    shelf.park_weights()
            torch.cuda.empty_cache()
            yield
        finally:
            torch.cuda.empty_cache()
            for shelf in shelves:
                shelf.back()

    def policy_was_sent(self) -> None:
        """Park the policy's own weights as well, and let go of what the sync left in torch's cache."""
        if self.park == "all" and self.policy is not None:
            self.policy.park_weights()
        torch.cuda.empty_cache()


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings' values, lists, tuples and data classes, and the gradients of leaves.

    >>> [tensor.item() for tensor in tensors_in({"a": [torch.tensor(1)], "b": (torch.tensor(2), "text")})]
    [1, 2]
    """
    if isinstance(thing, Tensor):
        yield thing
        if thing.is_leaf and thing.grad is not None:
            yield thing.grad
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_in(value)
    elif is_dataclass(thing) and not isinstance(thing, type):
        for one in fields(thing):
            yield from tensors_in(getattr(thing, one.name, None))


def _bytes_of(storage: Any) -> Sequence[Tensor]:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).split(CHUNK_BYTES)


def _refuse(module: nn.Module, args: Any) -> None:
    raise RunError(
        "engine.park: the weights must be on the device for a forward pass (they are parked while the generator is "
        "awake): set engine.park=optimizer, and report this"
    )
