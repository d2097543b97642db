"""Parking changes where bytes lie and no number: at each ZeRO stage, over ranks, with vLLM, through checkpoints."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from lab import logged, train, train_here, weights
from ranks import run_ranks
from test_engine import PACKED, STATES, WINDOWS, furthest, make_engine, recipe, take
from test_engine import weights as weights_of
from tiny import CPU, tiny_policy

from rlpost.check import check
from rlpost.collect import shard
from rlpost.critic import Critic, ValueModel
from rlpost.engine import Frozen
from rlpost.errors import RunError
from rlpost.generate import local_vllm
from rlpost.generate.base import Canary
from rlpost.generate.local_vllm import LocalVllm
from rlpost.parking import Parking, Shelf, park_of, tensors_in
from rlpost.recipe import EngineRecipe, GeneratorRecipe, Recipe

MICRO = PACKED.micros(WINDOWS[0])[0]


def here(tensors):
    """Bytes of the storages of some tensors, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def optimizer_tensors(engine):
    """What the optimizer says it keeps, by DeepSpeed's own names."""
    optimizer, basic = engine.deepspeed.optimizer, engine.deepspeed.basic_optimizer
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
    masters = [tensor for name in names for tensor in getattr(optimizer, name, [])]
    masters += [getattr(optimizer, "grad_partitions_flat_buffer", torch.empty(0))]
    return masters + [value for state in basic.state.values() for value in state.values() if torch.is_tensor(value)]


def stored_weights(engine):
    return [getattr(param, "ds_tensor", param) for param in engine.deepspeed.module.parameters()]


# One engine.


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_what_was_parked_takes_no_memory_and_comes_back_bit_for_bit(single_rank, stage, dtype):
    asked = recipe(stage, lr=1e-2, eps=1e-8)
    plain, parked = (make_engine(single_rank, asked, dtype=dtype) for _ in range(2))
    assert take(parked, WINDOWS[1]) == take(plain, WINDOWS[1])  # with it the optimizer has moments at every stage
    for documents in WINDOWS:
        assert here(optimizer_tensors(parked)) > 0
        parked.shelf.park_optimizer()
        assert here(optimizer_tensors(parked)) == 0
        logp_BT, _ = parked.token_logp(MICRO)  # the canary's pass: weights are there
        assert torch.equal(logp_BT, plain.token_logp(MICRO)[0])
        parked.shelf.park_weights()
        assert here(stored_weights(parked)) == 0
        parked.shelf.back()
        assert take(parked, documents) == take(plain, documents)
    after = weights_of(plain)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(parked).items())
    states = [list(tensors_in(vars(engine.deepspeed.basic_optimizer))) for engine in (plain, parked)]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_a_checkpoint_asked_for_while_parked_is_whole(single_rank, tmp_path, stage, dtype):
    asked = recipe(stage, lr=1e-2, eps=1e-8)
    first, second = (make_engine(single_rank, asked, dtype=dtype, seed=seed) for seed in (0, 5))
    take(first, WINDOWS[0])
    for engine in (first, second):
        engine.shelf.park_optimizer()
        engine.shelf.park_weights()
    first.save(tmp_path)
    second.load(tmp_path)
    assert take(second, WINDOWS[1]) == take(first, WINDOWS[1])
    after = weights_of(first)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(second).items())


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_a_forward_pass_over_parked_weights_is_refused(single_rank, stage):
    engine = make_engine(single_rank, recipe(stage))
    before = engine.token_logp(MICRO)[0]
    engine.shelf.park_weights()
    with pytest.raises(RunError, match=r"engine\.park: the weights must be on the device"):
        engine.token_logp(MICRO)
    engine.shelf.back()
    assert torch.equal(engine.token_logp(MICRO)[0], before)


def test_parking_twice_keeps_what_was_parked_first():
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    view = module.weight.detach()[1]
    shelf = Shelf(module, CPU)
    shelf.park_weights()
    shelf.park_weights()
    shelf.back()
    assert torch.equal(module.weight, before) and torch.equal(view, before[1])
    shelf.back()
    assert module(torch.ones(3)).shape == (2,)


def test_chunks_of_a_storage_return_to_their_places(monkeypatch):
    monkeypatch.setattr("rlpost.parking.CHUNK_BYTES", 12)
    module = torch.nn.Linear(5, 3, bias=False)
    before = module.weight.detach().clone()
    shelf = Shelf(module, CPU)
    shelf.park_weights()
    assert [len(chunks) for _, chunks in shelf._parked] == [5]
    shelf.back()
    assert torch.equal(module.weight, before)


# The choreography.


@pytest.fixture
def three(single_rank):
    """Policy, reference and critic, with what each of them has on the device."""
    engine = make_engine(single_rank, recipe(2))
    take(engine, WINDOWS[0])
    frozen = Frozen(tiny_policy(), recipe(2), dtype="float32", temperature=1.0, world=single_rank)
    critic = Critic(
        ValueModel(tiny_policy().model.model), recipe(2), dtype="float32", total_updates=4, world=single_rank
    )

    def held():
        found = {"weights": stored_weights(engine), "state": optimizer_tensors(engine)}
        found |= {"critic": stored_weights(critic), "critic state": optimizer_tensors(critic)}
        return {
            name for name, tensors in (found | {"reference": list(frozen.policy.parameters())}).items() if here(tensors)
        }

    return engine, [frozen.shelf, critic.shelf], held


EVERYTHING = {"weights", "state", "critic", "critic state", "reference"}


@pytest.mark.parametrize(
    ("park", "syncing", "generating"),
    [
        ("none", EVERYTHING, EVERYTHING),
        ("optimizer", {"weights", "critic", "reference"}, {"weights", "critic", "reference"}),
        ("all", {"weights"}, set()),
    ],
)
def test_each_part_makes_room_in_its_time(three, park, syncing, generating):
    engine, others, held = three
    parking = Parking(park, engine.shelf, others)
    with parking.making_room():
        assert held() == syncing
        parking.policy_was_sent()
        assert held() == generating
    assert held() == EVERYTHING
    with pytest.raises(KeyError), parking.making_room():
        parking.policy_was_sent()
        raise KeyError("a reward")
    assert held() == EVERYTHING


class RecordedLlm:
    """Stands in for vLLM on a GPU: writes down what is asked of it, and what the trainer holds then."""

    def __init__(self, held):
        self.held, self.calls = held, []
        cache = SimpleNamespace(enable_prefix_caching=True, block_size=16)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def say(self, what):
        self.calls.append((what, sorted(self.held())))

    def wake_up(self, tags):
        self.say(f"wake {','.join(tags)}")

    def sleep(self, level):
        self.say(f"sleep {level}")


@pytest.fixture
def sleeping(three, monkeypatch):
    """A vLLM generator on what it takes for a GPU, fed by a policy that is parked."""
    engine, others, held = three
    engine.parking = Parking("all", engine.shelf, others)
    llm = RecordedLlm(held)
    monkeypatch.setattr(local_vllm, "start", lambda *_: llm)
    monkeypatch.setattr(LocalVllm, "_sync", lambda self, engine: llm.say("sync"))
    monkeypatch.setattr(LocalVllm, "_score", lambda self, ids: llm.say("score") or [0.0] * (len(ids) - 1))
    canary = Canary.of((2, 3, 28), tolerance=math.inf, device=CPU)
    world = SimpleNamespace(device=torch.device("cuda"), size=1)

    def start(level):
        return LocalVllm(
            Recipe(generator=GeneratorRecipe(sleep_level=level)), None, SimpleNamespace(context=64), canary, world
        )

    return engine, llm, start


ROUND = [("wake weights", ["weights"]), ("sync", ["weights"]), ("wake kv_cache", []), ("score", [])]


@pytest.mark.parametrize("level", (1, 2))
def test_vllm_wakes_in_two_steps_and_sleeps_before_anything_comes_back(sleeping, level):
    engine, llm, start = sleeping
    generator = start(level)
    everything = sorted(EVERYTHING)
    assert llm.calls == [(f"sleep {level}", everything)]  # the caller's parking is around the start
    llm.calls.clear()
    with generator.awake(engine, 0):
        llm.say("generate")
    assert llm.calls == [*ROUND, ("generate", []), (f"sleep {level}", [])]


def test_level_two_sends_every_weight_again_and_level_one_only_new_ones(sleeping):
    engine, llm, start = sleeping
    for level, sent in ((1, [0, 1]), (2, [0, 0, 1])):
        generator, seen = start(level), []
        for version in (0, 0, 1):
            llm.calls.clear()
            with generator.awake(engine, version):
                seen += [version for what, _ in llm.calls if what == "sync"]
        assert seen == sent


def test_vllm_sleeps_after_a_failure_too_and_then_all_is_back(sleeping, three):
    engine, llm, start = sleeping
    generator, held = start(1), three[2]
    with pytest.raises(KeyError), generator.awake(engine, 0):
        raise KeyError("a reward")
    assert llm.calls[-1] == ("sleep 1", []) and held() == EVERYTHING
    with generator.awake(engine, 0):
        assert ("wake kv_cache", []) in llm.calls


def test_park_is_decided_by_what_takes_turns():
    def decided(on_gpu=True, generator=None, **engine):
        asked = Recipe(generator=GeneratorRecipe(**(generator or {})), engine=EngineRecipe(**engine))
        return park_of(asked, on_gpu=on_gpu)

    assert decided() == "optimizer"
    assert decided(on_gpu=False) == "none"
    assert decided(offload_optimizer=True) == "none"
    assert decided(generator={"sleep_level": 0}) == decided(generator={"kind": "hf"}) == "none"
    assert decided(on_gpu=False, park="all") == "all"


@pytest.mark.parametrize(
    ("engine", "generator", "said"),
    [
        ({"offload_params": True}, {}, r"engine.offload_params needs engine.zero_stage=3 \(got 2\)"),
        ({"park": "all"}, {"sleep_level": 0}, r"engine.park must be none with generator.sleep_level=0 \(got all\)"),
        ({"park": "optimizer", "offload_optimizer": True}, {}, "engine.park must not be optimizer with engine.offload"),
        (
            {"park": "all", "offload_params": True, "zero_stage": 3},
            {},
            "engine.park must not be all with engine.offload",
        ),
    ],
)
def test_check_refuses_what_parks_nothing(engine, generator, said):
    asked = Recipe(engine=EngineRecipe(**engine), generator=GeneratorRecipe(**generator))
    assert [line for line in check(asked) if re.search(said, line)]
    fine = Recipe(engine=EngineRecipe(park="all", offload_optimizer=True), generator=GeneratorRecipe(**generator))
    assert not [line for line in check(fine) if line.startswith("engine.") and "sleep_level" not in line]


# Whole runs.


def test_a_parked_run_is_the_same_run(tmp_path_factory, lab, single_rank):
    options = "engine.zero_stage=2", "algorithm.kl.coef=0.01", "save_every=2"
    plain = train_here(lab, single_rank, "here-plain", *options)
    parked = train_here(lab, single_rank, "here-parked", *options, "engine.park=all")
    assert plain == parked
    resumed = train_here(lab, single_rank, "here-parked", *options, "engine.park=all", "resume=auto", "steps=5")
    assert resumed[:4] == parked and len(resumed) == 5
    again = train_here(lab, single_rank, "here-plain", *options, "resume=auto", "steps=5")
    assert again == resumed


@pytest.mark.slow
def test_a_parked_run_with_vllm_is_the_same_run(lab):
    assert train(lab, "parked", "engine.park=all") == logged(lab, "first")
    plain, parked = weights(lab, "first", 4), weights(lab, "parked", 4)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in parked.items())


@pytest.mark.slow
def test_a_parked_run_is_the_same_run_on_two_ranks_under_zero_3(lab):
    options = "engine.zero_stage=3", "generator.kind=hf", "tasks.eval=null", "algorithm.kl.coef=0.01"
    plain = train(lab, "two-plain", *options, ranks=2)
    assert train(lab, "two-parked", *options, "engine.park=all", ranks=2) == plain


# ZeRO-Offload.


def trained(world, stage, dtype, **changes):
    """Weights after two optimizer steps on this rank's documents."""
    engine = make_engine(
        world, recipe(stage, lr=1e-2, eps=1e-8, grad_clip=1.0, weight_decay=0.1, **changes), dtype=dtype
    )
    norms = [take(engine, [one for _, one in shard(window, world.rank, world.size)]) for window in WINDOWS]
    return weights_of(engine), norms, engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True}),
        (3, {"offload_params": True}),
        (3, {"offload_optimizer": True, "offload_params": True}),
    ],
)
def test_offloading_trains_as_without(single_rank, stage, offload, dtype):
    plain, plain_norms, _ = trained(single_rank, stage, dtype)
    moved, norms, engine = trained(single_rank, stage, dtype, **offload)
    assert furthest(moved, plain) < (1e-6 if dtype == "float32" else 1e-4)
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    assert furthest(plain, dict(tiny_policy().model.named_parameters())) > 0.005
    asked = engine.deepspeed.config["zero_optimization"]
    assert ("offload_optimizer" in asked, "offload_param" in asked) == tuple(
        offload.get(key, False) for key in ("offload_optimizer", "offload_params")
    )


def offloaded_on_ranks(world):
    found = []
    for stage, offload in ((2, {"offload_optimizer": True}), (3, {"offload_optimizer": True, "offload_params": True})):
        plain, plain_norms, _ = trained(world, stage, "float32")
        moved, norms, _ = trained(world, stage, "float32", **offload)
        found.append([furthest(moved, plain), max(abs(a - b) for a, b in zip(norms, plain_norms, strict=True))])
    return found


@pytest.mark.slow
def test_offloading_trains_as_without_on_two_ranks():
    for found in run_ranks(offloaded_on_ranks):
        assert all(weight < 1e-6 and norm < 1e-5 for weight, norm in found), found
