"""Where a model comes from: every source ends as one ordinary Hugging Face folder that transformers and vLLM read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpost.check_parallel import has_window
from rlpost.errors import RunError
from rlpost.recipe import InitModel, Model, Recipe
from rlpost.world import World

READY = "rlpost_ready.json"
"""Written last into a folder that was made here: one without it was cut off and is made again."""


def model_folder(recipe: Recipe, world: World) -> Path:
    """The folder with the run's start weights and tokenizer; made once, by the main rank, where it is not there yet."""
    model = recipe.model
    if model.init is not None:
        asked: dict[str, Any] = {
            "init": asdict(model.init),
            "context": model.context,
            "dtype": model.dtype,
            "seed": recipe.seed,
        }
        return _made(Path(recipe.run_dir), "init", asked, lambda to: _from_init(recipe, to), world)
    if model.path is None:
        raise RunError("model.path or model.init must be given: name a folder, a hub model, or describe a new one")
    if model.path.endswith(".gguf"):
        asked = {"path": str(Path(model.path).resolve()), "dtype": model.dtype}
        return _made(Path(recipe.run_dir), "gguf", asked, lambda to: _from_gguf(model, to), world)
    local = Path(model.path).expanduser()
    return local if local.is_dir() else _from_hub(model.path, world)


def context_length(model: Model, folder: Path) -> int:
    """Tokens of prompt and completion together: `model.context`, or what the model was made for."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"model.path must be a model folder with a readable config.json (got {folder}: {error})"
        ) from error
    made_for = config.get("text_config", config).get("max_position_embeddings")
    if made_for is None and model.context is None:
        raise RunError(f"model.context must be given: {folder}/config.json does not say how long a text may be")
    if made_for is not None and model.context is not None and model.context > made_for:
        raise RunError(
            f"model.context must be at most what the model was made for (got {model.context}, and {folder} has "
            f"max_position_embeddings={made_for}): lower it"
        )
    return int(model.context or made_for)


def hidden_size(folder: Path) -> int:
    """Width of a model folder's hidden states."""
    return int(text_config(folder)["hidden_size"])


def looks_at_everything(folder: Path) -> bool:
    """Whether every layer's attention reaches back to the start: no sliding window, which a mask would undo."""
    return not has_window(text_config(folder))


def text_config(folder: Path) -> dict[str, Any]:
    """The configuration of the language model in a folder."""
    config = json.loads((folder / "config.json").read_text())
    return dict(config.get("text_config", config))


def cached_folder(run_dir: Path, kind: str, asked: dict) -> Path:
    """Where a model made from `asked` is kept: the name holds a digest of everything that shaped it."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return run_dir / "models" / f"{kind}-{digest}"


def is_ready(folder: Path) -> bool:
    """Whether a folder made here is whole."""
    return (folder / READY).is_file()


def mark_ready(folder: Path, asked: dict) -> None:
    """Say that a folder made here is whole, and what it was made from."""
    (folder / READY).write_text(json.dumps(asked, indent=2, sort_keys=True) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder below `run_dir`, or say what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"run_dir must be writable ({error}): choose another run_dir=..., or give yourself access"
        ) from error


def _made(run_dir: Path, kind: str, asked: dict, make: Callable[[Path], None], world: World) -> Path:
    folder = cached_folder(run_dir, kind, asked)
    if world.is_main and not is_ready(folder):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        make(folder)
        mark_ready(folder, asked)
    world.barrier()
    return folder


def _from_init(recipe: Recipe, to: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlpost.policy import DTYPES
    from rlpost.render import build_tokenizer

    init = recipe.model.init
    assert isinstance(init, InitModel)
    tokenizer = build_tokenizer(init)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=init.hidden_size,
        intermediate_size=init.intermediate_size,
        num_hidden_layers=init.num_layers,
        num_attention_heads=init.num_heads,
        num_key_value_heads=init.num_kv_heads or init.num_heads,
        max_position_embeddings=recipe.model.context or 2048,
        tie_word_embeddings=init.tie_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model: Any = LlamaForCausalLM(config)
    model.to(DTYPES[recipe.model.dtype]).save_pretrained(to)
    tokenizer.save_pretrained(to)


def _from_gguf(recipe: Model, to: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlpost.policy import DTYPES

    assert recipe.path is not None
    file = Path(recipe.path).expanduser()
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=DTYPES[recipe.dtype])
    # The weights are plain after loading, but stay marked as quantised; an ordinary folder must not say so.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(to)


def _from_hub(name: str, world: World) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        if world.local_rank == 0:
            snapshot_download(name, allow_patterns=patterns)
        world.barrier()
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"model.path must be a folder with config.json, a .gguf file, or a hub name that can be reached "
            f"(got {name!r}: {reason}): correct the path, or download the model first"
        ) from error
