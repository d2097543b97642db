"""Policies as ordinary Hugging Face folders, which transformers and vLLM read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlpost.checkpoint import Checkpoints
from rlpost.engine import Engine, checkpoint_weights
from rlpost.errors import RunError
from rlpost.policy import load_policy
from rlpost.recipe import load
from rlpost.weights import PREFIX, WeightStream
from rlpost.world import World

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "*.jinja", "*.py")
"""What a model folder holds beside the weights and what `save_pretrained` writes."""


def export_policy(engine: Engine, to: Path, *, like: Path) -> None:
    """Write the engine's policy into `to`, with the tokenizer of the folder `like`; every rank calls it."""
    stream = WeightStream(engine.deepspeed.module, bucket_bytes=engine.recipe.sync_bucket_mib << 20)
    state: dict[str, Tensor] = {}
    for name, tensor in stream:
        if engine.world.is_main:
            state[name] = tensor.cpu()
    if engine.world.is_main:
        write_folder(engine.deepspeed.module.model, state, to, like=like)
    engine.world.barrier()


def export_checkpoint(checkpoint: Path, model: Any, to: Path, *, like: Path) -> None:
    """Write a checkpoint's weights into `to`; `model` is any instance of the architecture, in the dtype to save."""
    weights = checkpoint_weights(checkpoint)
    state = {
        name.removeprefix(PREFIX): tensor.to(model.dtype) for name, tensor in weights.items() if name.startswith(PREFIX)
    }
    known = dict(model.named_parameters())
    missing = sorted(known.keys() - state.keys())
    if missing:
        raise RunError(
            f"{checkpoint} must hold every weight of {like} (it lacks {missing[0]}): is it of another model?"
        )
    write_folder(model, {name: state[name] for name in known}, to, like=like)


def write_folder(model: Any, state: Mapping[str, Tensor], to: Path, *, like: Path) -> None:
    """`save_pretrained` with the given weights, and the tokenizer's files copied beside them."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(to, state_dict=dict(state))
        for pattern in TOKENIZER_FILES:
            for file in like.glob(pattern):
                shutil.copy2(file, to / file.name)
    except OSError as error:
        raise RunError(
            f"the model could not be written to {to} ({error}): make room there, or choose another folder"
        ) from error


def export_run(run_folder: Path, world: World, *, checkpoint: Path | None, to: Path | None) -> Path:
    """Write a run's checkpoint (the newest whole one where none is named) as a model folder, and return it."""
    saved = run_folder / "recipe.yaml"
    if not saved.is_file():
        raise RunError(
            f"{run_folder} must be the folder of a run (it has no recipe.yaml): name one such as runs/quickstart"
        )
    checkpoint = checkpoint or Checkpoints(run_folder, world, keep=1).newest()
    if checkpoint is None:
        raise RunError(f"{run_folder} must hold a whole checkpoint (it has none): set save_every, or let the run end")
    start = Path(json.loads((checkpoint / "state.json").read_text())["model"])
    if not start.is_dir():
        raise RunError(f"{run_folder}: the model that the run started from must still be there (no folder {start})")
    target = to or run_folder / "model"
    export_checkpoint(checkpoint, load_policy(start, load(saved).model).model, target, like=start)
    return target
