"""What a recipe, its model and its ranks must be to each other where several ranks share each row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.recipe import Recipe


def parallel_problems(recipe: Recipe, world_size: int) -> list[str]:
    """Every problem of `engine.sequence_parallel` that shows without loading a model; a hub model is checked later."""
    size = recipe.engine.sequence_parallel
    if size <= 1:
        return []
    problems = []
    if world_size % size:
        problems.append(
            f"engine.sequence_parallel must divide the number of ranks (got {size} on {world_size}): start more ranks "
            "(WORLD_SIZE says how many), or lower it"
        )
    if recipe.model.attention == "eager":
        problems.append(
            f"model.attention must be auto, sdpa or flash_attention_2 for engine.sequence_parallel={size} (got eager): "
            "transformers has no place to exchange heads in eager attention"
        )
    if recipe.algorithm.loss["use"] == "clip_cov":
        problems.append(
            f"engine.sequence_parallel must be 1 for algorithm.loss=clip_cov (got {size}): it leaves out tokens by "
            "random numbers, which differ between the ranks that share a row"
        )
    return problems + split_problems(_config(recipe), size)


def split_problems(config: Mapping[str, Any], size: int) -> list[str]:
    """What keeps attention of a Hugging Face text configuration from being split over `size` ranks by its heads."""
    heads = config.get("num_attention_heads")
    if size <= 1 or not heads:
        return []
    problems = []
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % size:
        problems.append(
            f"engine.sequence_parallel must divide the model's attention heads (got {size} and {heads}): choose a "
            "divisor, each rank computes whole heads"
        )
    elif kv_heads % size and size % kv_heads:
        problems.append(
            f"engine.sequence_parallel must divide the model's key-value heads, or be a multiple of them (got {size} "
            f"and {kv_heads}): choose another"
        )
    if has_window(config):
        problems.append(
            f"engine.sequence_parallel must be 1 for a model with a sliding window or other attention than full (got "
            f"{size}): the exchange knows full attention only; set it to 1"
        )
    return problems


def has_window(config: Mapping[str, Any]) -> bool:
    """Whether some layer's attention does not reach back to the start, by a Hugging Face text configuration."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return window is not None or bool(set(config.get("layer_types") or ()) - {"full_attention"})


def _config(recipe: Recipe) -> dict[str, Any]:
    init, path = recipe.model.init, recipe.model.path
    if init is not None:
        return {"num_attention_heads": init.num_heads, "num_key_value_heads": init.num_kv_heads}
    file = Path(path or "").expanduser() / "config.json"
    if not path or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError:
        return {}
    return dict(config.get("text_config", config)) if isinstance(config, dict) else {}
