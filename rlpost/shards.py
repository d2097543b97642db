"""A module in training as named pieces, and their files: what is read back is the same numbers, whoever reads them.

Each ZeRO stage cuts the float32 weights and Adam's moments its own way over any number of ranks. A file here says which
numbers of which parameter it holds, so a rank of another stage, or of another number of ranks, reads just those that it
holds itself, and nothing is converted or computed. DeepSpeed's own files are pickles for the layout that wrote them;
its universal checkpoints are a second copy of everything, made by a tool between two runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.errors import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")
META = "meta.json"
Write = Callable[[Path], None]
"""Writes a copy of a state into a folder: no collectives, and nothing of it changes meanwhile."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`numel` numbers of a parameter from `start` on, and where they are in a float32 tensor of the optimizer.

    >>> Piece("head.weight", 6, 2, torch.arange(8.0), 3).of("weight", {})
    tensor([3., 4.])
    """

    name: str
    start: int
    numel: int
    holder: Tensor
    """What the optimizer steps; the moments of the same shape are its state."""
    offset: int

    def of(self, kind: str, state: Any) -> Tensor:
        """The weights, or one of the moments, as a view."""
        whole = self.holder if kind == "weight" else state[self.holder][kind]
        return whole.detach().view(-1).narrow(0, self.offset, self.numel)

    def share(self, rank: int, size: int) -> Piece:
        """The part that one of `size` ranks writes, where all of them hold the same."""
        first, end = self.numel * rank // size, self.numel * (rank + 1) // size
        return Piece(self.name, self.start + first, end - first, self.holder, self.offset + first)


class Shards:
    """What this rank holds of a DeepSpeed engine's trained weights and of its AdamW."""

    def __init__(self, engine: Any, rank: int, size: int) -> None:
        self.engine, self.optimizer = engine, engine.basic_optimizer
        self.rank, self.size = rank, size
        named = [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]
        self.shapes = {name: list(getattr(param, "ds_shape", param.shape)) for name, param in named}
        self.pieces = [piece for name, param in named for piece in _held(engine.optimizer, name, param)]
        sharded = all(hasattr(param, "ds_id") or hasattr(param, "_hp_mapping") for _, param in named)
        self.written = self.pieces if sharded else [piece.share(rank, size) for piece in self.pieces]
        if getattr(engine.optimizer, "swap_optimizer", False):
            raise RunError(
                "engine.deepspeed: the optimizer's state must be in memory to be saved (offload_optimizer to nvme): "
                "use engine.offload_optimizer=true"
            )

    def snapshot(self, tag: str, about: dict[str, Any]) -> Write:
        """Copy this rank's pieces into the host's memory; the result writes them below `tag`, with `about`."""
        state, steps = self.optimizer.state, self._adam_steps()
        if steps is not None:
            self._give_state(steps)  # to a weight that had no gradient yet, which stage 0 alone leaves without moments
        kinds = ("weight", *MOMENTS) if steps is not None else ("weight",)
        copies = {
            f"{kind}/{piece.name}@{piece.start}": piece.of(kind, state).to("cpu", torch.float32, copy=True)
            for piece in self.written
            if piece.numel
            for kind in kinds
        }
        meta = json.dumps({**about, "adam_steps": steps, "shapes": self.shapes}) if self.rank == 0 else None

        def write(folder: Path) -> None:
            (folder / tag).mkdir(parents=True, exist_ok=True)
            save_tensors(copies, folder / tag / f"rank-{self.rank:04d}.safetensors")
            if meta is not None:
                (folder / tag / META).write_text(meta, encoding="utf-8")

        return write

    def load(self, folder: Path) -> dict[str, Any]:
        """Read this rank's pieces from whatever ranks wrote them, and return what was saved with them."""
        about = read_meta(folder)
        _check_shapes(about["shapes"], self.shapes, folder)
        steps = about["adam_steps"]
        kinds = ("weight", *MOMENTS) if steps is not None else ("weight",)
        if steps is None:
            self.clear_optimizer()
        else:
            self._give_state(steps)
            for state in filter(None, self.optimizer.state.values()):
                state["step"].fill_(steps)
        with ExitStack() as stack:
            files = Files(folder, stack)
            for piece in self.pieces:
                for kind in kinds:
                    files.read(kind, piece.name, piece.start, piece.of(kind, self.optimizer.state))
        _refresh(self.engine.optimizer)
        return about

    def clear_optimizer(self) -> None:
        """Forget the moments and step counts, in place: DeepSpeed keeps views of them."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def _adam_steps(self) -> int | None:
        """Steps that the moments have seen; None where there are none yet."""
        return max((int(state["step"]) for state in self.optimizer.state.values() if state), default=None)

    def _give_state(self, steps: int) -> None:
        for holder in {id(piece.holder): piece.holder for piece in self.pieces}.values():
            state = self.optimizer.state[holder]
            if not state:
                state["step"] = torch.tensor(float(steps))
                state |= {name: torch.zeros_like(holder, requires_grad=False) for name in MOMENTS}


def _held(wrapper: Any, name: str, param: Any) -> Iterator[Piece]:
    """What this rank's optimizer holds of a parameter: nothing, a part, or all of it."""
    if hasattr(param, "ds_id"):  # ZeRO-3: equal parts of each parameter, the last one filled up
        group, offset, size = wrapper.grad_position[wrapper.get_param_id(param)]
        start = size * torch.distributed.get_rank(param.ds_process_group)
        held = min(size, param.ds_numel - start)
        if held > 0:
            yield Piece(name, start, held, wrapper.fp32_partitioned_groups_flat[group], offset)
    elif hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2: equal parts of all parameters in a row
        if (mapped := param._hp_mapping) is not None:
            parts = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
            at, of = mapped.hp_fragment_address, mapped.lp_fragment_address
            yield Piece(name, of.start, of.numel, parts[mapped.param_group_index], at.start)
    else:
        yield Piece(name, 0, param.numel(), param, 0)


def _refresh(wrapper: Any) -> None:
    """Give the weights of the forward pass the values of the optimizer's; what DeepSpeed does after a step."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        wrapper._partition_all_parameters()
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()


class Files:
    """The pieces in a folder, whoever wrote them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._found: dict[str, list[tuple[int, Any, str]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                whose, _, start = key.rpartition("@")
                self._found.setdefault(whose, []).append((int(start), file, key))

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fill `into` with the numbers of a parameter from `start` on."""
        end, filled = start + into.numel(), 0
        for first, file, key in self._found.get(f"{kind}/{name}", []):
            there = file.get_slice(key)
            low, high = max(start, first), min(end, first + there.get_shape()[0])
            if low < high:
                into[low - start : high - start].copy_(there[low - first : high - first])
                filled += high - low
        if filled != into.numel():
            raise RunError(
                f"resume: {self.folder} must hold all of {name} ({kind}: it has {filled} of {into.numel()} numbers): "
                "choose another checkpoint"
            )


def read_meta(folder: Path) -> dict[str, Any]:
    """What was saved beside the pieces."""
    if not (folder / META).is_file():
        raise RunError(
            f"resume: {folder.parent} must hold an engine checkpoint (it has no {folder.name}/{META}): choose another, "
            "or start with resume=never"
        )
    return dict(json.loads((folder / META).read_text(encoding="utf-8")))


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """Every trained weight in a folder, float32, by name."""
    shapes: dict[str, Sequence[int]] = read_meta(folder)["shapes"]
    found = {name: torch.empty(list(shape), dtype=torch.float32) for name, shape in shapes.items()}
    with ExitStack() as stack:
        files = Files(folder, stack)
        for name, tensor in found.items():
            files.read("weight", name, 0, tensor.view(-1))
    return found


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; whatever the disk says is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _check_shapes(saved: dict[str, list[int]], own: dict[str, list[int]], folder: Path) -> None:
    odd = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if odd:
        raise RunError(
            f"resume: the checkpoint {folder.parent} must be of this model ({odd[0]} is {saved.get(odd[0], 'missing')} "
            f"there and {own.get(odd[0], 'not trained')} here): set model and model.lora as they were"
        )
