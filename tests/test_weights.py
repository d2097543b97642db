import pytest
import torch
from ranks import run_ranks
from tiny import tiny_policy

from rlpost.engine import Engine
from rlpost.recipe import EngineRecipe
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


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 5000, 1 << 20])
def test_buckets_hold_every_weight_in_order_and_stay_within_their_size(bucket_bytes):
    policy = tiny_policy()
    buckets = list(WeightStream(policy, bucket_bytes=bucket_bytes)._buckets())
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in policy.model.named_parameters()]
    for bucket in buckets:
        assert len(bucket) == 1 or sum(4 * param.numel() for _, param in bucket) <= bucket_bytes


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
