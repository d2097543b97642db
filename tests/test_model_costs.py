"""What passes cost, from a model's own layers, against what PyTorch counts on it."""

from __future__ import annotations

import pytest
import torch
from test_flops import CONFIGS, B, T, counted, made, rows, shape_of
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from rlpost.adapter import add_adapters
from rlpost.critic import ValueModel
from rlpost.flops import Costs, backward_flops, forward_flops, full_pairs
from rlpost.model_costs import model_costs
from rlpost.policy import Policy
from rlpost.recipe import Lora, Model

SIZES = {"positions": B * T, "pairs": full_pairs([T] * B), "logits": 24}
GPT2 = GPT2Config(vocab_size=211, n_embd=64, n_layer=3, n_head=4, n_positions=64)


def recipe(**changes) -> Model:
    return Model(path="here", attention="eager", **changes)


def assert_counted(module, costs, sizes, *, rel=1e-9) -> None:
    """Forward and backward of a policy or value model on packed rows."""
    tokens_BT, position_BT, target_BT, mask_BT = rows()
    inputs = [tokens_BT, position_BT, mask_BT]
    how = {}
    if isinstance(module, Policy):
        inputs, how = [tokens_BT, position_BT, target_BT, mask_BT], {"temperature": 1.0}

    def run():
        out = module(*inputs, **how)
        return out[0] if isinstance(out, tuple) else out

    assert counted(run) == pytest.approx(costs.forward(**sizes), rel=rel)
    out_BT = run()  # outside: a counter around it hides what checkpointing computes again
    assert counted(lambda: out_BT.sum().backward()) == pytest.approx(costs.backward(**sizes), rel=rel)


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_grouped_and_tied_models_cost_what_torch_counts(name) -> None:
    model = made(CONFIGS[name])
    assert_counted(Policy(model, logp_chunk=7), model_costs(model, recipe(), with_head=True), SIZES)


@pytest.mark.parametrize("name", ["llama dense", "qwen2 grouped", "qwen3 wide heads"])
def test_adapters_beside_frozen_weights_cost_what_torch_counts(name) -> None:
    model = add_adapters(made(CONFIGS[name]), Lora(rank=8), seed=0)
    costs = model_costs(model, recipe(), with_head=True)
    assert_counted(Policy(model, logp_chunk=7), costs, SIZES)
    whole = model_costs(made(CONFIGS[name]), recipe(), with_head=True)
    assert costs.non_embedding == whole.non_embedding and costs.needed(**SIZES) < whole.needed(**SIZES)


def test_adapters_of_some_layers_are_counted_to_two_percent() -> None:
    """In the first block of three, keys have no gradient, which the formula does not know."""
    model = add_adapters(made(CONFIGS["llama dense"]), Lora(rank=8, targets=["q_proj", "v_proj"]), seed=0)
    assert_counted(Policy(model, logp_chunk=7), model_costs(model, recipe(), with_head=True), SIZES, rel=0.02)


def test_layers_without_a_gate_and_with_transposed_weights_cost_what_torch_counts() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2, attn_implementation="eager")
    assert_counted(Policy(model, logp_chunk=7), model_costs(model, recipe(), with_head=True), SIZES)


@pytest.mark.parametrize("name", ["llama dense", "qwen2 grouped"])
def test_a_critic_costs_what_torch_counts(name) -> None:
    model = made(CONFIGS[name]).base_model
    values = ValueModel(model)
    # Its head is one number a position: 0.1 % of this small model.
    assert_counted(values, model_costs(model, recipe(), with_head=False), SIZES, rel=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_costs_of_a_shape_are_those_of_its_model(name) -> None:
    of_shape, of_model = Costs.of(shape_of(CONFIGS[name])), model_costs(made(CONFIGS[name]), recipe(), with_head=True)
    assert of_shape.forward(**SIZES) == of_model.forward(**SIZES) == forward_flops(shape_of(CONFIGS[name]), **SIZES)
    again = backward_flops(shape_of(CONFIGS[name]), **SIZES, logits_again=True)
    assert of_shape.backward(**SIZES) == of_model.backward(**SIZES) == again
    assert of_model.needed(**SIZES) == 3 * of_model.forward(**SIZES)


def test_what_is_computed_twice_is_in_backward_and_not_in_what_is_needed() -> None:
    model = made(CONFIGS["llama dense"])
    plain = model_costs(model, recipe(), with_head=True)
    twice = model_costs(model, Model(path="here", attention="sdpa", gradient_checkpointing=True), with_head=True)
    shape = shape_of(CONFIGS["llama dense"])
    asked = backward_flops(shape, **SIZES, fused_attention=True, checkpointed=True, logits_again=True)
    assert twice.backward(**SIZES) == asked > plain.backward(**SIZES)
    assert twice.needed(**SIZES) == plain.needed(**SIZES)


def test_experts_that_share_the_work_are_not_counted_wrongly_but_not_at_all() -> None:
    config = MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    assert model_costs(AutoModelForCausalLM.from_config(config), recipe(), with_head=True) is None
