"""What a pass of a model in memory costs, from its own layers, with the adapters and frozen weights that it has."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlpost.flops import Costs
from rlpost.recipe import Model

INTO_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"})
"""Layers that take what enters a block; in the first block that is the embedding."""


def model_costs(model: Any, recipe: Model, *, with_head: bool) -> Costs | None:
    """The costs of a causal language model, or of the transformer in it; None where they cannot be told.

    They cannot where a matrix is neither in a linear layer nor an embedding, and where experts share the work.
    """
    config = model.config.get_text_config()
    layers, head = _linear_layers(model, config), model.get_output_embeddings() if with_head else None
    if layers is None:
        return None
    frozen_start = not any(param.requires_grad for param in _embeddings(model))
    first, weights, dx, dw = True, 0, 0, 0
    for name, (size, trained) in layers.items():
        own = name.replace(".base_layer", "").partition(".lora_")[0].rpartition(".")[2]
        first = first and own in INTO_ATTENTION
        at_start = frozen_start and first and ".lora_B" not in name
        weights, dx, dw = weights + size, dx + size * (not at_start), dw + size * trained
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    outside = {id(param) for param in _embeddings(model)} | ({id(head.weight)} if head is not None else set())
    params = {id(param): param for name, param in model.named_parameters() if ".lora_" not in name}
    return Costs(
        weights=weights,
        dx=dx,
        dw=dw,
        pair=4 * config.num_hidden_layers * heads * head_dim,
        head=0 if head is None else head.in_features * head.out_features,
        head_trained=head is not None and head.weight.requires_grad,
        fused_attention=recipe.attention != "eager",
        checkpointed=recipe.gradient_checkpointing,
        non_embedding=sum(_numel(param) for key, param in params.items() if key not in outside),
    )


def _linear_layers(model: Any, config: Any) -> dict[str, tuple[int, bool]] | None:
    """Weights, and whether they are trained, of every linear layer but the head; None where there are others."""
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head = model.get_output_embeddings()
    known = {id(param) for param in _embeddings(model)} | ({id(head.weight)} if head is not None else set())
    layers: dict[str, tuple[int, bool]] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
            size = module.nx * module.nf
        else:
            continue
        layers[name] = size, module.weight.requires_grad
        known.add(id(module.weight))
    others = [param for param in model.parameters() if len(_shape(param)) > 1 and id(param) not in known]
    return None if others else layers


def _embeddings(model: Any) -> list[nn.Parameter]:
    return [module.get_parameter("weight") for module in model.modules() if isinstance(module, nn.Embedding)]


def _shape(param: Any) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))  # of the whole, where ZeRO-3 keeps a shard


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", param.numel()))
