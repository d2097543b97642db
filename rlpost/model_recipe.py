"""The `model` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class InitModel:
    """A small Llama made from nothing, with a tokenizer that needs no hub."""

    tokenizer: Literal["char", "byte"] = "byte"
    alphabet: str = ""
    """The characters that a `char` tokenizer knows; any other is an error, never an unknown token."""
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int | None = None
    tie_embeddings: bool = True


@dataclass
class Lora:
    """Low-rank adapters in place of full training: W + (alpha / rank) B A, and only A and B learn. arXiv:2106.09685."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    """On the adapters' input, where a gradient is taken; above 0 the first ratio of a batch is not 1."""
    targets: Any = "all-linear"
    """`all-linear`: every linear layer but the head; or a list of the layers' names, such as `[q_proj, v_proj]`."""
    quantize: Literal["nf4"] | None = None
    """nf4: frozen weights in 4 bits, through bitsandbytes (QLoRA, arXiv:2305.14314)."""


@dataclass
class Model:
    """Where the policy's weights come from: `path`, or `init` for a new small one."""

    path: str | None = None
    """A Hugging Face causal LM folder, a hub name, or a GGUF file."""
    init: InitModel | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    context: int | None = None
    """Prompt and completion together, in tokens; None: what the model was made for."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """auto: flash attention's variable-length path where it is installed and there is a GPU, else sdpa."""
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    """Keep what gradient checkpointing saves, the input of each layer, in the host's memory until it is needed."""
    logp_chunk: int = 512
    """Tokens whose logits are alive at once."""
    head_dtype: Literal["float32"] | None = None
    """float32: logits are products of float32 numbers, here and in vLLM; weights stay as `dtype`. None: as `dtype`."""
    trust_remote_code: bool = False
    lora: Lora | None = None
    """None: all weights are trained, also by `sft`."""
