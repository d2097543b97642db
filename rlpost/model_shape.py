"""The shape of a recipe's model and its parameters by role, from its configuration: no weight is read or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.flops import Shape
from rlpost.recipe import Recipe

ROLES = {"embed": "embedding", "attn": "attention", "mlp": "MLP", "lm_head": "head", "norm": "norm"}
"""Parts of a parameter's name, first match wins, and what it belongs to."""


def model_sizes(recipe: Recipe) -> tuple[Shape, dict[str, int]]:
    """The model's shape and its parameters by role, from its configuration; nothing but that is fetched."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(recipe)
    text = config.get_text_config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    params: dict[str, int] = {}
    for name, param in model.named_parameters():  # a tied head is the embedding, and comes once
        role = next((role for part, role in ROLES.items() if part in name), "other")
        params[role] = params.get(role, 0) + param.numel()
    shape = Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp=getattr(text, "intermediate_size", 0),
        vocab=text.vocab_size,
        head_norms=any("q_norm" in name for name, _ in model.named_parameters()),
    )
    ours, theirs = shape.attention_weights + shape.mlp_weights, params.get("attention", 0) + params.get("MLP", 0)
    if abs(ours - theirs) > 0.01 * theirs:
        raise RunError(
            f"model.path must be a dense decoder with gated MLPs for --plan (a {config.model_type} of this shape has "
            f"{theirs} weights in its layers, and {ours} were expected): leave out --plan"
        )
    return shape, params


def model_config(recipe: Recipe) -> Any:
    """The configuration of a recipe's model, fetched where it is on the hub only."""
    from transformers import AutoConfig, LlamaConfig

    from rlpost.render import build_tokenizer

    init, path = recipe.model.init, recipe.model.path or ""
    if init is not None:
        return LlamaConfig(
            vocab_size=len(build_tokenizer(init)),
            hidden_size=init.hidden_size,
            intermediate_size=init.intermediate_size,
            num_hidden_layers=init.num_layers,
            num_attention_heads=init.num_heads,
            num_key_value_heads=init.num_kv_heads or init.num_heads,
            tie_word_embeddings=init.tie_embeddings,
        )
    local = Path(path).expanduser()
    where = {"gguf_file": local.name} if local.suffix == ".gguf" else {}
    try:
        return AutoConfig.from_pretrained(
            str(local.parent) if where else str(local) if local.is_dir() else path,
            trust_remote_code=recipe.model.trust_remote_code,
            **where,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"model.path must have a config.json that can be read or fetched (got {path!r}: {reason}): correct the "
            "path, or download the model first"
        ) from error
