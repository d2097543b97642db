"""Policies as ordinary Hugging Face folders, which transformers and vLLM read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.adapter import save_adapter
from rlpost.checkpoint import Checkpoints
from rlpost.engine import Engine, checkpoint_weights
from rlpost.errors import RunError
from rlpost.policy import Policy, load_policy
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


@torch.no_grad()
def load_trained(checkpoint: Path, policy: Policy, *, like: Path) -> None:
    """Write what was trained up to a checkpoint into a policy that is as it was at the start of the run."""
    weights = checkpoint_weights(checkpoint)
    trained = {name: param for name, param in policy.named_parameters() if param.requires_grad}
    missing = sorted(trained.keys() - weights.keys())
    if missing:
        raise RunError(
            f"{checkpoint} must hold every trained weight of {like} (it lacks {missing[0].removeprefix(PREFIX)}): is "
            "it of another model, or of another model.lora?"
        )
    for name, param in trained.items():
        param.copy_(weights[name])


def write_adapter(policy: Policy, to: Path, *, base: Path) -> None:
    """The adapters of a policy as a folder of peft, to be put on the model in `base`."""
    own = {name.removeprefix(PREFIX): param.detach() for name, param in policy.named_parameters()}
    with says_where(to):
        to.mkdir(parents=True, exist_ok=True)
        save_adapter(policy.model, own, to, base=base)


def write_folder(model: Any, state: Mapping[str, Tensor], to: Path, *, like: Path) -> None:
    """`save_pretrained` with the given weights, and the tokenizer's files copied beside them."""
    with says_where(to):
        to.mkdir(parents=True, exist_ok=True)
        unquantized(model).save_pretrained(to, state_dict=dict(state))
        for pattern in TOKENIZER_FILES:
            for file in like.glob(pattern):
                shutil.copy2(file, to / file.name)


def unquantized(model: Any) -> Any:
    """The model, or one without weights to stand for it whose folder does not ask for 4 bits."""
    if not hasattr(model.config, "quantization_config"):
        return model
    config = deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = model.generation_config
    return plain


@contextmanager
def says_where(to: Path) -> Iterator[None]:
    """Give an error of the file system the folder that was written to."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the model could not be written to {to} ({error}): make room there, or choose another folder"
        ) from error


def export_run(
    run_folder: Path, world: World, *, checkpoint: Path | None, to: Path | None, adapter: bool = False
) -> Path:
    """Write a run's checkpoint (the newest whole one where none is named) as a model folder, and return it.

    `adapter`: only the adapters, as a folder of peft.
    """
    saved = run_folder / "recipe.yaml"
    if not saved.is_file():
        raise RunError(
            f"{run_folder} must be the folder of a run (it has no recipe.yaml): name one such as runs/quickstart"
        )
    recipe = load(saved)
    if adapter and recipe.model.lora is None:
        raise RunError(
            f"{run_folder} must be a run with model.lora for --adapter (it trained all weights): leave it out"
        )
    checkpoint = checkpoint or Checkpoints(run_folder, world, keep=1).newest()
    if checkpoint is None:
        raise RunError(f"{run_folder} must hold a whole checkpoint (it has none): set save_every, or let the run end")
    start = Path(json.loads((checkpoint / "state.json").read_text())["model"])
    if not start.is_dir():
        raise RunError(f"{run_folder}: the model that the run started from must still be there (no folder {start})")
    target = to or run_folder / ("adapter" if adapter else "model")
    policy = load_policy(start, recipe.model)
    load_trained(checkpoint, policy, like=start)
    if adapter:
        write_adapter(policy, target, base=start)
    else:
        weights = WeightStream(policy, bucket_bytes=recipe.engine.sync_bucket_mib << 20)
        write_folder(policy.model, dict(weights), target, like=start)
    return target
