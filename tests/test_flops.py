"""The plan's arithmetic against what PyTorch counts on small real models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlpost.flops import (
    Shape,
    activation_bytes,
    backward_flops,
    cache_bytes,
    causal_pairs,
    decode_flops,
    forward_flops,
    full_pairs,
    prefill_flops,
    state_bytes,
)
from rlpost.policy import Policy

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama dense": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama grouped and tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2 grouped": Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=False),
    "qwen3 wide heads": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
}
B, T = 2, 24


def made(config, attention="eager"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def shape_of(config) -> Shape:
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        head_norms=config.model_type == "qwen3",
    )


def added_product(total, a, b, **_) -> int:
    """FLOPs of `total.addmm_(a, b)`, which PyTorch's own table leaves out; the arguments are shapes."""
    return 2 * a[0] * a[1] * b[1]


def counted(run) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        run()
    return counter.get_total_flops()


def rows():
    """Two packed rows, each of documents of 10 and 14 tokens, every second token trained."""
    tokens_BT = torch.randint(211, (B, T))
    position_BT = torch.cat([torch.arange(10), torch.arange(14)]).repeat(B, 1)
    mask_BT = (torch.arange(T) % 2 == 0).repeat(B, 1)
    return tokens_BT, position_BT, tokens_BT.roll(-1, 1), mask_BT


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_real_model(name) -> None:
    model, shape = made(CONFIGS[name]), shape_of(CONFIGS[name])
    matrices = {key: p.numel() for key, p in model.named_parameters() if p.ndim == 2 and "embed" not in key}
    head = matrices.pop("lm_head.weight", None)
    assert sum(matrices.values()) == shape.attention_weights + shape.mlp_weights
    assert head in (None, shape.head_weights)
    assert (head is None) == CONFIGS[name].tie_word_embeddings


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_are_what_torch_counts(name) -> None:
    model, shape, (tokens_BT, position_BT, *_) = made(CONFIGS[name]), shape_of(CONFIGS[name]), rows()
    sizes = {"positions": B * T, "pairs": full_pairs([T] * B), "logits": B * T}
    found = []
    forward = counted(lambda: found.append(model(input_ids=tokens_BT, position_ids=position_BT).logits))
    assert forward == pytest.approx(forward_flops(shape, **sizes), rel=0.01)
    assert counted(lambda: found[0].sum().backward()) == pytest.approx(backward_flops(shape, **sizes), rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_policy_costs_its_trained_logits_and_makes_them_anew(name) -> None:
    policy, shape, batch = Policy(made(CONFIGS[name]), logp_chunk=7), shape_of(CONFIGS[name]), rows()
    sizes = {"positions": B * T, "pairs": full_pairs([T] * B), "logits": int(batch[3].sum())}
    assert counted(lambda: policy(*batch, temperature=1.0)) == pytest.approx(forward_flops(shape, **sizes), rel=0.01)
    logp_BT, _ = policy(*batch, temperature=1.0)  # outside: a counter around it hides what checkpointing computes again
    asked = backward_flops(shape, **sizes, logits_again=True)
    assert counted(lambda: logp_BT.sum().backward()) == pytest.approx(asked, rel=0.01)


def test_checkpointed_backward_is_what_torch_counts() -> None:
    config = CONFIGS["llama grouped and tied"]
    model = made(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens_BT, position_BT, *_ = rows()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        logits_BTV = model.train()(input_ids=tokens_BT, position_ids=position_BT, use_cache=False).logits
        sizes = {"positions": B * T, "pairs": full_pairs([T] * B), "logits": B * T}
        asked = backward_flops(shape_of(config), **sizes, checkpointed=True)
        assert counted(lambda: logits_BTV.sum().backward()) == pytest.approx(asked, rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_what_torch_counts(name) -> None:
    model, prompt, completion = made(CONFIGS[name]).eval(), 9, 6

    def decode(cache=None) -> None:
        for _ in range(completion - 1):
            cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            cache = cache.past_key_values

    with torch.no_grad():
        start = model(input_ids=torch.zeros(1, prompt, dtype=torch.long), use_cache=True).past_key_values
        asked = decode_flops(shape_of(CONFIGS[name]), prompt=prompt, completion=completion)
        assert counted(lambda: decode(start)) == pytest.approx(asked, rel=0.01)


def test_generation_is_one_causal_pass_over_the_whole_answer() -> None:
    shape = shape_of(CONFIGS["qwen2 grouped"])
    apart = prefill_flops(shape, prompt=9) + decode_flops(shape, prompt=9, completion=6)
    assert apart == forward_flops(shape, positions=14, pairs=causal_pairs([14]), logits=6)


def test_fused_attention_costs_half_of_its_forward_more() -> None:
    shape, sizes = shape_of(CONFIGS["llama dense"]), {"positions": 0, "pairs": 100, "logits": 0}
    fused = backward_flops(shape, **sizes, fused_attention=True)
    assert fused == 2.5 * forward_flops(shape, **sizes)


def test_cache_is_as_large_as_that_of_transformers() -> None:
    config = CONFIGS["qwen3 wide heads"]
    cache = made(config)(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 5 * cache_bytes(shape_of(config), 4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_near_what_autograd_keeps(name, dtype) -> None:
    model, (tokens_BT, position_BT, *_) = made(CONFIGS[name], "sdpa").to(dtype), rows()
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=tokens_BT, position_ids=position_BT, use_cache=False)
    asked = activation_bytes(shape_of(CONFIGS[name]), dtype.itemsize, positions=B * T, checkpointed=False)
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(asked, rel=0.15)


@pytest.mark.parametrize(
    ("stage", "itemsize", "each"),
    [(0, 4, (4, 4, 0, 8)), (1, 2, (2, 6, 2, 4)), (2, 2, (2, 2, 2, 4)), (3, 2, (1, 2, 2, 4)), (2, 4, (4, 2, 2, 4))],
)
def test_state_is_sharded_as_the_zero_stage_has_it(stage, itemsize, each) -> None:
    held = state_bytes(1000, itemsize, zero_stage=stage, ranks=2)
    assert tuple(held.values()) == tuple(1000 * one for one in each)
