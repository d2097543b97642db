"""The policy: a causal language model that returns log-probs and entropies of given tokens, and nothing larger.

Logits of `[tokens, V]` are made for the trained tokens only, `logp_chunk` tokens at a time, and again in the backward
pass, so memory grows with `logp_chunk * V` and not with the batch.

A LoRA adapter would wrap `model` in `load_policy`, before `Policy` is made; nothing else in this file would change.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlpost.errors import RunError
from rlpost.recipe import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TokenLogp(nn.Module):
    """The language-model head and the log-softmax over it, chunk by chunk.

    It owns the head's weight (shared with the model), so that ZeRO-3 gathers it once for all chunks: the number of
    chunks differs between ranks, the number of gathers must not.
    """

    def __init__(self, head: nn.Linear, config: Any, *, chunk: int, entropy_grad: bool) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.chunk, self.entropy_grad = chunk, entropy_grad
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(self, hidden_ND: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob of each target and entropy of each distribution `[N]`, at least float32, in nats."""
        if len(target_N) <= self.chunk:
            return self._chunk(hidden_ND, target_N, temperature)
        pieces = [
            checkpoint(self._chunk, hidden, target, temperature, use_reentrant=False)
            for hidden, target in zip(hidden_ND.split(self.chunk), target_N.split(self.chunk), strict=True)
        ]
        logp, entropy = zip(*pieces, strict=True)
        return torch.cat(logp), torch.cat(entropy)

    def _chunk(self, hidden_ND: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits_NV = nn.functional.linear(hidden_ND, self.weight, self.bias)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        logits_NV = logits_NV / temperature
        lse_N = torch.logsumexp(logits_NV, dim=-1)
        logp_N = logits_NV.gather(-1, target_N[:, None]).squeeze(-1) - lse_N
        # A gradient would keep two more tensors of [N, V] until the backward pass.
        with nullcontext() if self.entropy_grad else torch.no_grad():
            p_NV = torch.softmax(logits_NV, dim=-1)
            entropy_N = lse_N - (p_NV * logits_NV).sum(-1)
        return logp_N, entropy_N


class Policy(nn.Module):
    """A causal LM over packed rows. Dropout is off: the first update of a batch must see a ratio of exactly 1."""

    def __init__(self, model: Any, *, logp_chunk: int, entropy_grad: bool = False) -> None:
        super().__init__()
        self.model = without_dropout(model)
        self.head = TokenLogp(model.get_output_embeddings(), model.config, chunk=logp_chunk, entropy_grad=entropy_grad)

    def forward(
        self, tokens_BT: Tensor, position_BT: Tensor, target_BT: Tensor, mask_BT: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy `[B, T]` of each target at the given temperature; 0 where the mask is False.

        Documents of a row are kept apart by `position_BT`, which restarts with each of them (transformers builds the
        block-diagonal causal mask, or flash attention's variable-length call, from it).
        """
        hidden_BTD = self.model.base_model(
            input_ids=tokens_BT, position_ids=position_BT, attention_mask=None, use_cache=False
        ).last_hidden_state
        where_N = trained_positions(mask_BT)
        logp_N, entropy_N = self.head(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[where_N], target_BT.reshape(-1)[where_N], temperature
        )
        return in_place(logp_N, where_N, mask_BT), in_place(entropy_N, where_N, mask_BT)


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
    """The model itself, with every dropout off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def load_policy(folder: Path, recipe: Model, *, entropy_grad: bool = False) -> Policy:
    """The policy with the weights of a Hugging Face folder; `entropy_grad`: its entropy can be trained."""
    model = load_language_model(folder, recipe)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise RunError(f"model.path must be a causal language model with a linear head (got {type(model).__name__})")
    return Policy(model, logp_chunk=recipe.logp_chunk, entropy_grad=entropy_grad)


def load_language_model(folder: Path, recipe: Model) -> Any:
    """The causal language model of a Hugging Face folder, ready to be trained on packed rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[recipe.dtype],
        attn_implementation=_attention(recipe),
        attention_dropout=0.0,
        trust_remote_code=recipe.trust_remote_code,
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def uses_flash_attention(recipe: Model) -> bool:
    """Whether rows go through flash attention, which packs without paying for the row's length squared."""
    return _attention(recipe).startswith("flash")


def _attention(recipe: Model) -> str:
    if recipe.attention != "auto":
        return recipe.attention
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
