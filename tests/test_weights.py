import pytest
import torch
from ranks import run_ranks
from tiny import tiny_llama, tiny_policy

from rlpost.adapter import adapters_off, add_adapters
from rlpost.engine import Engine
from rlpost.export import write_adapter
from rlpost.policy import Policy
from rlpost.recipe import EngineRecipe, Lora
from rlpost.weights import WeightStream


@pytest.mark.parametrize("tie", [True, False])
def test_stream_has_every_weight_once_under_its_hugging_face_name(tie):
    policy = tiny_policy(tie=tie)
    stream = WeightStream(policy, bucket_bytes=1 << 20)
    found = list(stream)
    assert [name for name, _ in found] == [name for name, _ in policy.model.named_parameters()]
    assert ("lm_head.weight" in dict(found)) != tie
    assert all(torch.equal(tensor, policy.model.state_dict()[name]) for name, tensor in found)
    assert stream.num_tensors == len(found) == 20 + (not tie)
    assert stream.num_bytes == 4 * sum(param.numel() for param in policy.model.parameters())


def test_stream_says_whether_it_was_read_to_the_end():
    stream = WeightStream(tiny_policy(), bucket_bytes=1 << 20)
    reader = iter(stream)
    next(reader)
    assert not stream.done
    list(reader)
    assert stream.done


def test_a_stream_can_be_read_again_and_gives_the_weights_as_they_are_then():
    policy = tiny_policy()
    stream = WeightStream(policy, bucket_bytes=5000)
    first = {name: tensor.clone() for name, tensor in stream}
    with torch.no_grad():
        policy.model.model.norm.weight[0] += 3.0
    again = dict(stream)
    assert float(again["model.norm.weight"][0] - first["model.norm.weight"][0]) == 3.0
    assert stream.num_tensors == len(again) == len(first)


@pytest.mark.parametrize("make", ["tied", "untied", "gpt2", "adapters"])
def test_metadata_is_what_is_streamed(make):
    model = MODELS.get(make, tiny_llama)()
    policy = adapted(model, torch.bfloat16) if make == "adapters" else Policy(model, logp_chunk=64)
    stream = WeightStream(policy, bucket_bytes=5000)
    assert stream.metadata() == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stream]


def test_a_stream_merges_adapters_as_strong_as_they_are_at_each_pass():
    policy = adapted(tiny_llama())
    stream = WeightStream(policy, bucket_bytes=5000)
    base = {name: param.detach() for name, param in tiny_llama().named_parameters()}
    with adapters_off(policy):
        assert all(torch.equal(tensor, base[name]) for name, tensor in stream)
    assert not all(torch.equal(tensor, base[name]) for name, tensor in stream)


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 5000, 1 << 20])
def test_buckets_hold_every_weight_in_order_and_stay_within_their_size(bucket_bytes):
    policy = tiny_policy()
    buckets = WeightStream(policy, bucket_bytes=bucket_bytes).buckets
    names = [part.name for bucket in buckets for part in bucket]
    assert names == [name for name, _ in policy.model.named_parameters()]
    for bucket in buckets:
        assert len(bucket) == 1 or sum(4 * part.param.numel() for part in bucket) <= bucket_bytes


def test_what_is_streamed_needs_no_gradient():
    assert not any(tensor.requires_grad for _, tensor in WeightStream(tiny_policy(), bucket_bytes=1))


def streamed(world, stage):
    """Whether whole weights come out of a sharded policy, kept past the gather, for small and large buckets."""
    expected = {name: param.detach().clone() for name, param in tiny_policy(tie=False).model.named_parameters()}
    asked = EngineRecipe(zero_stage=stage)
    policy = tiny_policy(tie=False)
    engine = Engine(policy, asked, dtype="float32", temperature=1.0, total_updates=1, world=world)
    same = []
    for bucket_bytes in (1, 5000, 1 << 20):
        kept = list(WeightStream(engine.deepspeed.module, bucket_bytes=bucket_bytes))
        same.append([name for name, _ in kept] == list(expected))
        same.append(all(torch.equal(tensor, expected[name]) for name, tensor in kept))
    return {"same": same, "held": sum(param.numel() for param in engine.deepspeed.module.parameters())}


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_stream_from_an_engine_gives_whole_weights(single_rank, stage):
    assert streamed(single_rank, stage)["same"] == [True] * 6


@pytest.mark.slow
def test_stream_gathers_whole_weights_from_two_zero3_shards():
    for result in run_ranks(streamed, stage=3):
        assert result["same"] == [True] * 6
        assert result["held"] == 0  # between gathers a rank holds no whole parameter


# Adapters.


def tiny_gpt2():
    """It keeps the weights of its linear layers transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 29, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=1))


def adapted(model, dtype=torch.float32):
    """A policy with adapters that add something to every linear layer."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    add_adapters(model, Lora(rank=3, alpha=5), seed=0)
    dice = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if ".lora_B." in name:
            param.data = (0.1 * torch.randn(param.shape, generator=dice)).to(dtype)
    return Policy(model, logp_chunk=64)


MODELS = {"tied": tiny_llama, "untied": lambda: tiny_llama(tie=False), "gpt2": tiny_gpt2}


@pytest.mark.parametrize("bucket_bytes", [1, 5000, 1 << 20])
@pytest.mark.parametrize("make", MODELS)
def test_stream_of_a_policy_with_adapters_is_what_peft_merges(tmp_path, make, bucket_bytes):
    from peft import PeftModel

    base, policy = MODELS[make](), adapted(MODELS[make]())
    before = {name: param.detach().clone() for name, param in policy.named_parameters()}
    found = list(WeightStream(policy, bucket_bytes=bucket_bytes))
    assert [name for name, _ in found] == [name for name, _ in base.named_parameters()]
    assert all(torch.equal(param, before[name]) for name, param in policy.named_parameters())
    assert not any(tensor.requires_grad for _, tensor in found)
    write_adapter(policy, tmp_path, base=tmp_path / "base")
    unchanged = {name: param.clone() for name, param in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    torch.testing.assert_close(dict(found), dict(merged.named_parameters()), rtol=0, atol=1e-7)
    moved = {name for name, tensor in found if float((tensor - unchanged[name]).detach().abs().max()) > 0.01}
    assert len(moved) == {"gpt2": 2 * 4}.get(make, 2 * 7)


def test_stream_of_bfloat16_adapters_is_rounded_once():
    policy = adapted(tiny_llama(), torch.bfloat16)
    found = dict(WeightStream(policy, bucket_bytes=5000))
    layer = policy.model.model.layers[1].mlp.up_proj
    a, b = (pair["default"].weight.double() for pair in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.double() + b @ a * (5 / 3)
    gap = (found["model.layers.1.mlp.up_proj.weight"].double() - exact).abs()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert bool((gap <= exact.abs() * 2**-8).all()) and not torch.equal(exact.bfloat16(), layer.base_layer.weight)
