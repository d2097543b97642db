"""The stream from two real ZeRO-3 shards over gloo: what comes out, when it is gathered, and who may stop early."""

import pytest
import torch
from ranks import run_ranks
from test_weights import MODELS, adapted
from tiny import tiny_policy

from rlpost.engine import Engine
from rlpost.recipe import EngineRecipe
from rlpost.weights import WeightStream

BUCKETS = (1, 5000, 20000, 1 << 20)
"""Bytes; the first is smaller than any weight, the last holds all of them."""


def sharded(world, policy, dtype="float32"):
    engine = Engine(policy, EngineRecipe(zero_stage=3), dtype=dtype, temperature=1.0, total_updates=1, world=world)
    return engine.deepspeed.module


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def whole_weights(world, tie, dtype):
    kind = getattr(torch, dtype)
    expected = {name: p.detach().clone() for name, p in tiny_policy(tie=tie, dtype=kind).model.named_parameters()}
    module = sharded(world, tiny_policy(tie=tie, dtype=kind), dtype)
    result = []
    for bucket_bytes in BUCKETS:
        stream = WeightStream(module, bucket_bytes=bucket_bytes)
        meta = [(name, dtype, shape) for name, dtype, shape in stream.metadata()]
        for _ in range(2):  # the same stream again
            kept = list(stream)
            result += [
                same(dict(kept), expected) and len(kept) == len(expected),
                meta == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept],
                stream.num_bytes == sum(p.numel() * p.element_size() for p in expected.values()),
                stream.done,
                sum(param.numel() for param in module.parameters()) == 0,  # no parameter was gathered in place
            ]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("tie", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_two_shards_stream_whole_weights_bit_for_bit_as_the_metadata_says(tie, dtype):
    assert run_ranks(whole_weights, tie=tie, dtype=dtype) == [[True] * 5 * 2 * len(BUCKETS)] * 2


def merged_weights(world, make):
    whole = adapted(MODELS[make](), torch.bfloat16)
    expected = {name: tensor.clone() for name, tensor in WeightStream(whole, bucket_bytes=1 << 20)}
    module = sharded(world, adapted(MODELS[make](), torch.bfloat16), "bfloat16")
    shards = [param.ds_tensor.clone() for param in module.parameters()]
    result = []
    for bucket_bytes in BUCKETS:
        stream = WeightStream(module, bucket_bytes=bucket_bytes)
        result.append(same(dict(stream), expected))
        result.append([meta[0] for meta in stream.metadata()] == list(expected))
    untouched = [torch.equal(param.ds_tensor, shard) for param, shard in zip(module.parameters(), shards, strict=True)]
    return [*result, all(untouched)]


@pytest.mark.slow
@pytest.mark.parametrize("make", ["tied", "gpt2"])
def test_two_shards_stream_merged_adapters_and_keep_their_own_weights(make):
    assert run_ranks(merged_weights, make=make) == [[True] * (2 * len(BUCKETS) + 1)] * 2


class Recorded:
    """The collectives that are started and waited for, and what the consumer takes, in the order of events."""

    def __init__(self):
        self.events = []

    def __enter__(self):
        self.original = torch.distributed.all_gather_single
        torch.distributed.all_gather_single = self.start
        return self

    def __exit__(self, *_):
        torch.distributed.all_gather_single = self.original

    def start(self, output, shard, **options):
        self.events.append("start")
        handle = self.original(output, shard, **options)
        events = self.events

        class Handle:
            def wait(self):
                events.append("wait")
                return handle.wait()

        return Handle()


def order_of_events(world):
    module = sharded(world, tiny_policy(tie=False))
    stream = WeightStream(module, bucket_bytes=20000)
    with Recorded() as recorded:
        for _ in stream:
            recorded.events.append("take")
    return {"events": recorded.events, "buckets": [len(bucket) for bucket in stream.buckets]}


@pytest.mark.slow
def test_the_next_bucket_is_on_its_way_before_the_last_one_is_taken_and_no_third():
    for result in run_ranks(order_of_events):
        sizes = result["buckets"]
        assert len(sizes) > 3
        expected = ["start"] * sizes[0]
        for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
            expected += ["wait"] * size + ["start"] * following + ["take"] * size
        assert result["events"] == expected


def stops_early(world, bucket_bytes):
    module = sharded(world, tiny_policy(tie=False))
    stream = WeightStream(module, bucket_bytes=bucket_bytes)
    with Recorded() as recorded:
        reader = iter(stream)
        if world.rank == 0:
            next(reader)
            reader.close()
        else:
            list(reader)
    ended = recorded.events.count("start") == recorded.events.count("wait") == len(list(module.parameters()))
    after = sum(float(tensor.double().sum()) for _, tensor in stream)  # the ranks are still in step
    return {"done": stream.done, "ended": ended, "after": after, "together": world.all_gather_object(after)}


@pytest.mark.slow
@pytest.mark.parametrize("bucket_bytes", [1, 20000])
def test_a_rank_that_stops_early_leaves_no_other_waiting_and_no_gather_open(bucket_bytes):
    first, second = run_ranks(stops_early, bucket_bytes=bucket_bytes, timeout_s=120)
    expected = sum(float(p.detach().double().sum()) for p in tiny_policy(tie=False).model.parameters())
    assert first["ended"] and second["ended"] and first["done"] and second["done"]
    assert first["together"] == [first["after"], second["after"]]
    assert first["after"] == pytest.approx(expected, abs=1e-9)


def test_shards_that_are_not_there_are_refused_by_their_key(single_rank):
    from rlpost.errors import RunError

    module = sharded(single_rank, tiny_policy())
    stream = WeightStream(module, bucket_bytes=1 << 20)
    param = next(module.parameters())
    param.ds_tensor.data = param.ds_tensor.data.to(torch.int8)
    with pytest.raises(RunError, match=r"engine\.deepspeed: the shards .*not quantized.*int8"):
        list(stream)
