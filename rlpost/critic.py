"""The critic: a transformer that says at each position of a rollout which reward is to be expected.

It starts as the policy's base model without its language-model head; in place of that, a linear map to one number that
is 0 at the start: a random one would begin with values that no reward has given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.engine import Trained
from rlpost.policy import hidden_states, in_place, load_language_model, seen, trained_positions, without_dropout
from rlpost.recipe import Model
from rlpost.sequence_parallel import WHOLE, Columns
from rlpost.types import Micro


class ValueHead(nn.Module):
    """A linear map to one number, computed in float32 (or finer) whatever the weights are kept in."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """One number for each hidden state `[N]`."""
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        return hidden_ND.to(dtype) @ self.weight.to(dtype) + self.bias.to(dtype)


class ValueModel(nn.Module):
    """A base transformer with a value head over packed rows; dropout is off, as in the policy."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = without_dropout(model)
        self.head = ValueHead(model.config.get_text_config().hidden_size).to(model.dtype)

    def forward(
        self,
        tokens_BT: Tensor,
        position_BT: Tensor,
        mask_BT: Tensor,
        *,
        seen_BTT: Tensor | None = None,
        columns: Columns = WHOLE,
    ) -> Tensor:
        """Value `[B, T]`, float32; 0 where the mask is False.

        At position t it is that of the state before token t + 1 is written, so it stands where that token's log-prob
        does.
        """
        hidden_BtD = hidden_states(self.model, tokens_BT, position_BT, seen_BTT, columns)
        mask_Bt = columns.own(mask_BT)
        where_N = trained_positions(mask_Bt)
        value_N = self.head(hidden_BtD.reshape(-1, hidden_BtD.shape[-1])[where_N])
        return columns.whole(in_place(value_N, where_N, mask_Bt), mask_BT.shape[1])


class Critic(Trained):
    """A value model in training."""

    tag = "critic"
    lr_key = "algorithm.critic.lr"

    def values(self, micro: Micro) -> Tensor:
        """Value `[B, T]` of the state in which each of the micro-batch's targets is written."""
        inputs = micro.tokens_BT, micro.position_BT, micro.mask_BT
        return self.deepspeed(*inputs, seen_BTT=seen(micro), columns=self.columns)


def load_value_model(folder: Path, recipe: Model) -> ValueModel:
    """A value model on the base transformer of a Hugging Face folder."""
    return ValueModel(load_language_model(folder, recipe).base_model)
