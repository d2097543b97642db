"""LoRA: low-rank adapters beside frozen linear layers, put there by peft. arXiv:2106.09685; QLoRA: arXiv:2305.14314.

Only the adapters are trained, saved and given to the optimizer. They are kept in the recipe's dtype, as all that is
trained: in bfloat16 DeepSpeed's sharded optimizer holds the float32 copy. Whoever asks for weights, a generator or an
export, gets whole ones with the adapters in them, under the names of the model without adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.errors import RunError
from rlpost.recipe import Lora

NAME = "default"
"""What peft calls the one adapter of a layer."""
BASE = ".base_layer."
"""Between the name of a layer that has an adapter and those of its own weights."""
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to the weight of its layer: scaling B A.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    >>> LowRank(a, b, scaling=0.5).added_to(torch.zeros(2, 2)).tolist()
    [[1.5, 3.0], [0.0, 0.0]]
    """

    a: Tensor
    """`[rank, in]`"""
    b: Tensor
    """`[out, rank]`"""
    scaling: float
    transposed: bool = False
    """Whether the layer keeps its weight as `[in, out]`, as in GPT-2."""

    def added_to(self, weight: Tensor) -> Tensor:
        """W + scaling B A, added in float32 (or finer) and rounded once to the dtype of W."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta = self.b.detach().to(exact) @ self.a.detach().to(exact) * self.scaling
        return (weight.to(exact) + (delta.T if self.transposed else delta)).to(weight.dtype)


class AdapterDropout(nn.Module):
    """Dropout where a gradient is recorded: what is only scored is the policy that the generator samples from."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """The input with a share `p` of it at 0, and the rest scaled up."""
        return nn.functional.dropout(x, self.p, training=self.training and torch.is_grad_enabled())


def add_adapters(model: Any, recipe: Lora, *, seed: int) -> Any:
    """The model itself with adapters that add nothing yet (B = 0), and every other weight frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(model, recipe.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets,
        fan_in_fan_out=any(isinstance(layer, _conv1d()) for layer in linear_layers(model).values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # A is random, and must be the same on every rank
        inject_adapter_in_model(config, model, adapter_name=NAME)
    for layer in adapted_layers(model).values():
        layer.lora_A.to(model.dtype)
        layer.lora_B.to(model.dtype)
        if recipe.dropout:
            layer.lora_dropout[NAME] = AdapterDropout(recipe.dropout)
    return model


def check_targets(model: Any, targets: str | list[str]) -> None:
    """Every name in `targets` must be that of a linear layer which can have an adapter."""
    if isinstance(targets, str):
        return
    names = linear_layers(model)
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise RunError(
            f"model.lora.targets must be names of linear layers of the model other than its head (got {unknown[0]}; "
            f"it has {', '.join(known)}): correct it, or use all-linear"
        )


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer of a model but its head, by name."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, _conv1d())
    layers: dict[str, nn.Module] = dict(model.named_modules())
    return {name: layer for name, layer in layers.items() if isinstance(layer, kinds) and layer is not head}


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def quantization(recipe: Lora | None, dtype: torch.dtype) -> Any:
    """How transformers is to quantize the frozen weights while it loads them; None: not at all."""
    if recipe is None or recipe.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=recipe.quantize, bnb_4bit_compute_dtype=dtype)


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Every layer that has an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def base_weights(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name without adapters, parameter, and the layer whose adapter changes it, of every weight but the adapters'."""
    layers = adapted_layers(module)
    for name, param in module.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        owner, _, own = name.partition(BASE)
        layer = layers.get(owner) if own == "weight" else None
        yield name.replace(BASE, "."), param, layer


def low_rank(layer: Any) -> LowRank:
    """What the adapter of a layer adds to its weight as things stand."""
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return LowRank(a, b, layer.scaling[NAME], transposed=layer.fan_in_fan_out)


def dense(param: Any) -> Tensor:
    """A weight as numbers that can be added to, whatever it is kept in."""
    if not hasattr(param, "quant_state"):
        return param.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(param)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The module as it was before it had adapters.

    They are scaled by 0 and not left out: ZeRO-3 fetches weights ahead in the order of the last pass.
    """
    layers = adapted_layers(module).values()
    scalings = [layer.scaling[NAME] for layer in layers]
    for layer in layers:
        layer.scaling[NAME] = 0.0
    try:
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[NAME] = scaling


def save_adapter(model: Any, weights: Mapping[str, Tensor], to: Path, *, base: Path) -> None:
    """Write the adapters of a model, with these weights, as a folder that peft puts on the model in `base`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    own = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=NAME, save_embedding_layers=False)
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = str(base), True
    config.save_pretrained(to)
    # peft's own names start where its wrapper stands around the model.
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in own.items()}, to / ADAPTER_FILE)
