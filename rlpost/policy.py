"""The policy: a causal language model that returns log-probs and entropies of given tokens, and nothing larger.

Logits are made for the trained tokens only, `logp_chunk` of them at a time (`head.py`), so memory grows with
`logp_chunk * V` and not with the batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.adapter import add_adapters, quantization
from rlpost.errors import RunError
from rlpost.head import Head, token_logp
from rlpost.recipe import Model
from rlpost.sequence_parallel import WHOLE, Columns, in_columns
from rlpost.types import Micro

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TokenLogp(nn.Module):
    """The language-model head and the log-softmax over it.

    It owns the head's weight (shared with the model), so that ZeRO-3 gathers it once for all chunks: the number of
    chunks differs between ranks, the number of gathers must not.
    """

    def __init__(self, head: nn.Linear, config: Any, *, chunk: int, entropy_grad: bool, exact: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        scale, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        self.how = Head(
            scale=float(scale) / float(divisor),
            softcap=getattr(config, "final_logit_softcapping", None),
            chunk=chunk,
            entropy_grad=entropy_grad,
            exact=exact,
        )

    def forward(self, hidden_ND: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob of each target and entropy of each distribution `[N]`, at least float32, in nats."""
        return token_logp(hidden_ND, self.weight, self.bias, target_N, replace(self.how, temperature=temperature))


class Policy(nn.Module):
    """A causal LM over packed rows. Dropout is off: the first update of a batch must see a ratio of exactly 1."""

    def __init__(self, model: Any, *, logp_chunk: int, entropy_grad: bool = False, exact_head: bool = False) -> None:
        super().__init__()
        self.model = without_dropout(model)
        how: dict[str, Any] = {"chunk": logp_chunk, "entropy_grad": entropy_grad, "exact": exact_head}
        self.head = TokenLogp(model.get_output_embeddings(), model.config, **how)

    def forward(
        self,
        tokens_BT: Tensor,
        position_BT: Tensor,
        target_BT: Tensor,
        mask_BT: Tensor,
        *,
        temperature: float,
        seen_BTT: Tensor | None = None,
        columns: Columns = WHOLE,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy `[B, T]` of each target at the given temperature; 0 where the mask is False."""
        hidden_BtD = hidden_states(self.model.base_model, tokens_BT, position_BT, seen_BTT, columns)
        target_Bt, mask_Bt = columns.own(target_BT), columns.own(mask_BT)
        where_N = trained_positions(mask_Bt)
        logp_N, entropy_N = self.head(
            hidden_BtD.reshape(-1, hidden_BtD.shape[-1])[where_N], target_Bt.reshape(-1)[where_N], temperature
        )
        logp_Bt, entropy_Bt = in_place(logp_N, where_N, mask_Bt), in_place(entropy_N, where_N, mask_Bt)
        width = mask_BT.shape[1]
        return columns.whole(logp_Bt, width), columns.whole(entropy_Bt, width)


def hidden_states(
    transformer: Any, tokens_BT: Tensor, position_BT: Tensor, seen_BTT: Tensor | None, columns: Columns = WHOLE
) -> Tensor:
    """The last hidden states `[B, t, D]` of packed rows: of all their positions, or of this rank's `columns`.

    Without `seen_BTT` documents are kept apart by `position_BT`, which restarts with each of them (transformers builds
    the block-diagonal causal mask, or flash attention's variable-length call, from it).
    """
    mask = None
    if columns.size > 1 and not transformer.config._attn_implementation.startswith("flash"):
        seen_BTT = columns.seen(position_BT, seen_BTT)
    if seen_BTT is not None:
        dtype = transformer.dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=seen_BTT.device)
        mask = torch.where(seen_BTT, torch.zeros_like(hidden), hidden)[:, None]
    own = {"input_ids": columns.own(tokens_BT), "position_ids": columns.own(position_BT)}
    inputs = own | {"attention_mask": mask, "use_cache": False}
    output = transformer(**inputs) if columns.size == 1 else in_columns(transformer, columns, inputs)
    return output.last_hidden_state


def seen(micro: Micro) -> Tensor | None:
    """Which positions each one may look at `[B, T, T]`, True where it may; None where positions alone say it.

    Its own document, and the prompt that it shares with others, as far as they stand before it.
    """
    if not micro.shares_prompts:
        return None
    document_BT, prefix_BT = micro.document_BT, micro.prefix_BT
    length = document_BT.shape[1]
    before_TT = torch.ones(length, length, dtype=torch.bool, device=document_BT.device).tril()
    own_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    in_prompt_BT = (document_BT < 0) & (prefix_BT >= 0)
    prompt_BTT = (prefix_BT[:, :, None] == prefix_BT[:, None, :]) & in_prompt_BT[:, None, :]
    # What belongs to no document looks at itself: a softmax over nothing is NaN.
    itself_TT = torch.eye(length, dtype=torch.bool, device=document_BT.device)
    return (before_TT & ((own_BTT & (document_BT >= 0)[:, :, None]) | prompt_BTT)) | itself_TT


def trained_positions(mask_BT: Tensor) -> Tensor:
    """Where the flattened mask is True `[N]`; the first position where it is so nowhere.

    An empty micro-batch computes one throw-away token: every rank must pass through the head, forward and back.
    """
    return mask_BT.reshape(-1).nonzero().squeeze(-1) if mask_BT.any() else mask_BT.new_zeros(1, dtype=torch.long)


def in_place(x_N: Tensor, where_N: Tensor, mask_BT: Tensor) -> Tensor:
    """What was computed at `trained_positions`, laid out as the mask `[B, T]`; 0 where it is False."""
    x_BT = x_N.new_zeros(mask_BT.numel()).index_put((where_N,), x_N).view_as(mask_BT)
    return torch.where(mask_BT, x_BT, torch.zeros_like(x_BT))


def without_dropout(model: Any) -> Any:
    """The model itself, with every dropout of its own off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def load_policy(folder: Path, recipe: Model, *, entropy_grad: bool = False, seed: int = 0) -> Policy:
    """The policy with the weights of a Hugging Face folder; `entropy_grad`: its entropy can be trained."""
    model = load_language_model(folder, recipe, seed=seed)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise RunError(f"model.path must be a causal language model with a linear head (got {type(model).__name__})")
    exact_head = recipe.head_dtype == "float32"
    return Policy(model, logp_chunk=recipe.logp_chunk, entropy_grad=entropy_grad, exact_head=exact_head)


def load_language_model(folder: Path, recipe: Model, *, seed: int = 0) -> Any:
    """The causal language model of a Hugging Face folder, ready to be trained on packed rows; `seed`: of adapters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[recipe.dtype],
        attn_implementation=_attention(recipe),
        attention_dropout=0.0,
        quantization_config=quantization(recipe.lora, DTYPES[recipe.dtype]),
        trust_remote_code=recipe.trust_remote_code,
    )
    if recipe.lora is not None:
        model = add_adapters(model, recipe.lora, seed=seed)
    if recipe.gradient_checkpointing:
        to_host = recipe.offload_activations and torch.cuda.is_available()  # without a GPU they are there already
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, offload=to_host)
    return model.train()


def uses_flash_attention(recipe: Model) -> bool:
    """Whether rows go through flash attention, which packs without paying for the row's length squared."""
    return _attention(recipe).startswith("flash")


def _attention(recipe: Model) -> str:
    if recipe.attention != "auto":
        return recipe.attention
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
