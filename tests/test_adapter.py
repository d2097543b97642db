"""LoRA: what is trained, what is streamed, what is saved, and what the reference is."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from splits import Parts
from tiny import CPU, VOCAB, logp_and_entropy, ragged, tiny_llama, tiny_policy, write_folder

from rlpost.adapter import adapters_off, add_adapters
from rlpost.algorithm_recipe import KlReset
from rlpost.batch import make_batch
from rlpost.check import check
from rlpost.collect import shard
from rlpost.critic import Critic, load_value_model
from rlpost.engine import Engine, Frozen, WithoutAdapters
from rlpost.errors import RunError
from rlpost.generate.base import Canary, canary_tokens
from rlpost.generate.hf import HfGenerator
from rlpost.losses import ppo_clip, weighted_sum
from rlpost.metrics import Metrics
from rlpost.policy import Policy, load_policy
from rlpost.recipe import EngineRecipe, GeneratorRecipe, Lora, Model, Recipe
from rlpost.update import update
from rlpost.weights import WeightStream

STAGES = (0, 1, 2, 3)
STATES = [*((stage, "float32") for stage in STAGES), *((stage, "bfloat16") for stage in (1, 2, 3))]
DOCUMENTS = ragged(12, seed=0)
PACKED = Parts(30, 20, CPU, size=4, packed=True)
SMALL = Lora(rank=3, alpha=6)


def adapted(*, lora=SMALL, seed=0, dtype="float32", moved=True, **options):
    """A policy with adapters; `moved`: they already add something."""
    model = tiny_llama(**options)
    for param in model.parameters():
        param.data = param.data.to(getattr(torch, dtype))
    add_adapters(model, lora, seed=seed)
    dice = torch.Generator().manual_seed(seed + 1)
    for name, param in model.named_parameters():
        if moved and ".lora_B." in name:
            param.data = (0.1 * torch.randn(param.shape, generator=dice)).to(param.dtype)
    return Policy(model, logp_chunk=64)


def recipe(stage, **changes):
    return EngineRecipe(**({"zero_stage": stage, "lr": 0.3, "eps": 1.0, "grad_clip": 0.0} | changes))


def make_engine(world, asked, *, policy=None, dtype="float32"):
    policy = adapted(dtype=dtype) if policy is None else policy
    return Engine(policy, asked, dtype=dtype, temperature=1.0, total_updates=4, world=world)


def policy_loss(engine, micro):
    logp_BT, _ = engine.token_logp(micro)
    loss_BT, _ = ppo_clip(logp_BT, micro.behavior_logp_BT, micro.adv_BT, clip_low=0.2, clip_high=0.28)
    return weighted_sum(loss_BT, micro.weight_BT, engine.world.size), {}


def take(engine, documents=DOCUMENTS):
    """One optimizer step on this rank's documents, and the gradient's norm."""
    batch = make_batch(documents, PACKED, engine.world)
    return update(engine, batch, partial(policy_loss, engine), Metrics(engine.world))


def streamed(policy, bucket_bytes=3000):
    return {name: tensor.clone() for name, tensor in WeightStream(policy, bucket_bytes=bucket_bytes)}


def weights(engine):
    return streamed(engine.deepspeed.module)


def furthest(got, expected):
    assert got.keys() == expected.keys()
    return max(float((got[name].float() - tensor.float()).abs().max()) for name, tensor in expected.items())


def reference(asked, documents=DOCUMENTS):
    """Plain torch, one document at a time, on merged float32 weights and the chain rule: weights after a step, norm."""
    policy = adapted()
    trained = [param for param in policy.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.lr, betas=tuple(asked.betas), eps=asked.eps, weight_decay=0.0)
    plain, layers = tiny_llama(), dict(policy.model.named_modules())
    merged = {}
    for name, param in plain.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2 if hasattr(layer, "lora_A") else 0
        merged[name] = param.detach() + delta
    loss = sum(document_loss(plain, merged, one) for one in documents) / sum(one.num_trained for one in documents)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(trained, asked.grad_clip or math.inf))
    optimizer.step()
    return streamed(policy), norm


def document_loss(plain, merged, one):
    ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
    tied = {"lm_head.weight": merged["model.embed_tokens.weight"]} | merged
    logits = torch.func.functional_call(plain, tied, kwargs={"input_ids": ids, "use_cache": False}).logits
    logp_TV = torch.log_softmax(logits[0, :-1], -1)
    logp_T = logp_TV.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(one.prompt_ids) - 1 :]
    behavior_T, adv_T = torch.tensor(one.behavior_logp), torch.full_like(logp_T, one.advantage)
    return ppo_clip(logp_T, behavior_T, adv_T, clip_low=0.2, clip_high=0.28)[0].sum()


# The model.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_are_trained_in_the_models_type_and_add_nothing_at_first(dtype):
    policy = adapted(dtype=dtype, moved=False)
    trained = {name for name, param in policy.named_parameters() if param.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of every linear layer of two blocks, and none of the head
    assert {param.dtype for param in policy.parameters()} == {getattr(torch, dtype)}
    [micro] = Parts(30, 20, CPU, size=99).micros(DOCUMENTS)
    base = tiny_policy(dtype=getattr(torch, dtype))
    assert torch.equal(logp_and_entropy(policy, micro)[0], logp_and_entropy(base, micro)[0])


def test_the_seed_decides_what_adapters_begin_with_and_nothing_else():
    before = torch.get_rng_state()
    first, again, other = ({**adapted(seed=seed, moved=False).state_dict()} for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {
        n for n in first if ".lora_A." in n
    }


def test_targets_are_layers_by_name():
    policy = adapted(lora=Lora(rank=2, targets=["q_proj", "layers.1.mlp.down_proj"]))
    found = {name.partition(".lora_A.")[0] for name, _ in policy.named_parameters() if ".lora_A." in name}
    blocks = [f"model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert found == {*blocks, "model.model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_the_model_lacks_is_named_with_what_it_has(target):
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(RunError, match=rf"model.lora.targets must be .*\(got {target}; it has {known}\)"):
        adapted(lora=Lora(targets=["q_proj", target]))


def test_dropout_of_adapters_is_on_only_where_a_gradient_is_recorded():
    plain, dropping = adapted(), adapted(lora=Lora(rank=3, alpha=6, dropout=0.5))
    [micro] = Parts(30, 20, CPU, size=99).micros(DOCUMENTS)
    with torch.no_grad():
        assert torch.equal(logp_and_entropy(dropping, micro)[0], logp_and_entropy(plain, micro)[0])
    assert not torch.equal(logp_and_entropy(dropping, micro)[0], logp_and_entropy(dropping, micro)[0])


def test_adapters_are_back_after_a_pass_without_them():
    policy, [micro] = adapted(), Parts(30, 20, CPU, size=99).micros(DOCUMENTS)
    before, _ = logp_and_entropy(policy, micro)
    with pytest.raises(KeyError), adapters_off(policy):
        without, _ = logp_and_entropy(policy, micro)
        raise KeyError
    assert torch.equal(without, logp_and_entropy(tiny_policy(), micro)[0]) and not torch.equal(without, before)
    assert torch.equal(logp_and_entropy(policy, micro)[0], before)


# Training.


@pytest.mark.parametrize("grad_clip", (0.0, 0.05))
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_the_step_of_plain_torch_and_leaves_frozen_weights(single_rank, stage, grad_clip):
    asked = recipe(stage, grad_clip=grad_clip, weight_decay=0.0)
    engine = make_engine(single_rank, asked)
    before = weights(engine)
    norm = take(engine)
    expected, expected_norm = reference(asked)
    assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 0.1
    assert furthest(weights(engine), expected) < 2e-6
    assert furthest(before, expected) > 1e-3
    base = {name: param.detach() for name, param in tiny_llama().named_parameters()}
    assert without_adapters(engine, base) == 0.0


def without_adapters(engine, base):
    """How far the weights below the adapters are from `base`."""
    with adapters_off(engine.deepspeed.module):
        return furthest(weights(engine), base)


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_the_optimizer_holds_adapters_only(single_rank, stage, dtype):
    engine = make_engine(single_rank, recipe(stage), dtype=dtype)
    take(engine)
    moments = [value for state in engine.deepspeed.basic_optimizer.state.values() for value in state.values()]
    held = sum(value.numel() for value in moments if value.numel() > 1)
    sizes = [param.numel() for param in adapted().parameters() if param.requires_grad]
    assert 2 * sum(sizes) <= held < 2.1 * sum(sizes)  # padded by DeepSpeed


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_a_sync_touches_no_trained_weight(single_rank, stage, dtype):
    engine, micros = make_engine(single_rank, recipe(stage), dtype=dtype), PACKED.micros(DOCUMENTS)
    take(engine)
    before = [engine.token_logp(micro)[0] for micro in micros], state_of(engine)
    weights(engine)
    after = [engine.token_logp(micro)[0] for micro in micros], state_of(engine)
    assert all(
        torch.equal(a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    )


def state_of(engine):
    from deepspeed import zero

    params = list(engine.deepspeed.module.parameters())
    with zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
        return [param.detach().clone() for param in params]


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_t35_the_policy_without_its_adapters_is_the_base_model_exactly(single_rank, stage, dtype):
    engine = make_engine(single_rank, recipe(stage), dtype=dtype)
    base = tiny_policy(dtype=getattr(torch, dtype))
    frozen = Frozen(base, recipe(0), dtype=dtype, temperature=1.0, world=single_rank)
    off = WithoutAdapters(engine)
    for _ in range(2):
        take(engine)
        for micro in PACKED.micros(DOCUMENTS):
            with_adapters, logp_BT = engine.token_logp(micro)[0], off.token_logp(micro)
            assert torch.equal(logp_BT, frozen.token_logp(micro)) and not logp_BT.requires_grad
            assert torch.equal(engine.token_logp(micro)[0], with_adapters)
            assert float((with_adapters - logp_BT).abs().max()) > 0.01
    with pytest.raises(RunError, match=r"kl.reset must be off with model.lora"):
        off.follow(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_the_canary_passes_after_two_updates(single_rank, stage):
    engine = make_engine(single_rank, recipe(stage))
    canary = Canary.of(canary_tokens((2, 3, 28), VOCAB), tolerance=1e-4, device=CPU)
    generator = HfGenerator(Recipe(generator=GeneratorRecipe(kind="hf")), None, canary, single_rank)
    for version in range(3):
        with generator.awake(engine, version):
            assert generator.report.canary_max < 1e-4
        take(engine)
    with pytest.raises(RunError, match="same log-probs"), generator.awake(engine, 2):
        pass  # not synced since the last update


# Checkpoints.


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_no_frozen_weight(single_rank, tmp_path, stage, tie):
    policy = adapted(tie=tie, vocab=4000)
    make_engine(single_rank, recipe(stage), policy=policy).save(tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert written < 4000 * 32 * 4 / 2  # half of the embedding alone


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_adapters_resume_exactly(single_rank, tmp_path, stage, dtype):
    asked = recipe(stage, schedule="linear", warmup_steps=2, lr=1e-2, eps=1e-8, grad_clip=1.0)
    first = make_engine(single_rank, asked, dtype=dtype)
    take(first)
    first.save(tmp_path)
    norm = take(first)
    second = make_engine(single_rank, asked, policy=another(dtype), dtype=dtype)
    second.load(tmp_path)
    assert second.updates == 1
    assert take(second) == norm
    assert furthest(weights(second), weights(first)) == 0.0


def another(dtype):
    """A policy on the same frozen weights with other adapters."""
    policy = adapted(dtype=dtype)
    for param in policy.parameters():
        if param.requires_grad:
            param.data.add_(1.0)
    return policy


# The critic.


@pytest.mark.parametrize("stage", STAGES)
def test_a_critic_trains_adapters_and_its_head(single_rank, tmp_path, stage):
    folder = write_folder(tmp_path / "model")
    model = load_value_model(folder, Model(dtype="float32", lora=SMALL))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name} | {"head.weight", "head.bias"}
    critic = Critic(model, recipe(stage, lr=0.01, eps=1e-8), dtype="float32", total_updates=9, world=single_rank)

    def squares(micro):
        return weighted_sum((critic.values(micro) - 1) ** 2, micro.weight_BT, 1), {}

    batch = make_batch(DOCUMENTS, PACKED, single_rank)
    errors = [float(squares(batch.micros[0])[0])]
    for _ in range(6):
        update(critic, batch, squares, Metrics(single_rank))
    errors.append(float(squares(batch.micros[0])[0]))
    assert errors[1] < errors[0] / 2
    critic.save(tmp_path)
    fresh = load_value_model(folder, Model(dtype="float32", lora=SMALL))
    second = Critic(fresh, recipe(stage), dtype="float32", total_updates=9, world=single_rank)
    second.load(tmp_path)
    for micro in batch.micros:
        assert torch.equal(second.values(micro), critic.values(micro))


# Two ranks.


def on_two_ranks(world, folder):
    """For each stage: distance to plain torch, norm, what frozen weights and the reference do, and how it resumes."""
    mine = [one for _, one in shard(DOCUMENTS, world.rank, world.size)]
    found = {}
    for stage in (0, 2, 3):
        asked = recipe(stage, grad_clip=1.0)
        engine = make_engine(world, asked, policy=adapted(seed=0))
        norm = take(engine, mine)
        expected, expected_norm = reference(asked)
        distance = furthest(weights(engine), expected)
        frozen = Frozen(tiny_policy(), recipe(0), dtype="float32", temperature=1.0, world=world)
        off = WithoutAdapters(engine)
        micros = make_batch(mine, PACKED, world).micros
        gaps = [float((off.token_logp(micro) - frozen.token_logp(micro)).abs().max()) for micro in micros]
        engine.save(Path(folder) / str(stage))
        take(engine, mine)
        second = make_engine(world, asked, policy=another("float32"))
        second.load(Path(folder) / str(stage))
        take(second, mine)
        resumed = furthest(weights(second), weights(engine))
        found[stage] = {"distance": distance, "norms": [norm, expected_norm], "off": max(gaps), "resumed": resumed}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(on_two_ranks, folder=str(tmp_path_factory.mktemp("adapters")))


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 2, 3))
def test_two_ranks_take_the_same_step_and_resume_exactly(two_ranks, stage):
    for rank in two_ranks:
        found = rank[str(stage)]
        assert found["distance"] < 2e-6 and found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)
        assert found["off"] == found["resumed"] == 0.0


# Recipes.


def problems(lora, **changes):
    asked = Recipe(model=Model(path="owner/name", lora=lora))
    asked.engine.zero_stage = changes.get("zero_stage", 2)
    asked.algorithm.kl.reset = changes.get("reset", KlReset())
    return [problem for problem in check(asked) if "lora" in problem]


@pytest.mark.parametrize(
    ("lora", "changes", "expected"),
    [
        (Lora(rank=0, dropout=1.0), {}, ["lora.rank must be > 0 (got 0)", "lora.dropout must be in [0, 1) (got 1.0)"]),
        (Lora(targets="q_proj"), {}, ["lora.targets must be all-linear or a list of names of layers (got 'q_proj')"]),
        (Lora(targets=[]), {}, ["lora.targets must be all-linear or a list of names of layers (got [])"]),
        (Lora(), {"reset": KlReset(every=5)}, ["kl.reset.every must be 0 with model.lora (got 5)"]),
        (Lora(quantize="nf4"), {"zero_stage": 3}, ["lora.quantize=nf4 needs engine.zero_stage <= 2 (got 3)"]),
        (Lora(targets=["q_proj"]), {"zero_stage": 3}, []),
    ],
)
def test_what_a_recipe_must_say_of_adapters(monkeypatch, lora, changes, expected):
    monkeypatch.setattr("rlpost.check.find_spec", lambda name: name)
    found = problems(lora, **changes)
    assert len(found) == len(expected)
    assert all(text in problem for text, problem in zip(expected, found, strict=True))


def test_four_bits_need_their_package(monkeypatch):
    monkeypatch.setattr("rlpost.check.find_spec", lambda name: None if name == "bitsandbytes" else name)
    assert problems(Lora(quantize="nf4")) == [
        "model.lora.quantize=nf4 needs the package bitsandbytes: install it, or set it to null"
    ]


# Four bits.


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16")])
def test_four_bit_weights_are_streamed_as_the_trainer_reads_them(single_rank, tmp_path, stage, dtype):
    pytest.importorskip("bitsandbytes")
    folder = write_folder(tmp_path / "model", hidden=64)
    asked = Model(dtype=dtype, lora=Lora(rank=3, quantize="nf4", targets=["q_proj", "up_proj"]))
    engine = make_engine(single_rank, recipe(stage), policy=load_policy(folder, asked), dtype=dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    canary = Canary.of(canary_tokens((2, 3, 28), VOCAB), tolerance=tolerance, device=CPU)
    generator = HfGenerator(Recipe(generator=GeneratorRecipe(kind="hf")), None, canary, single_rank)
    before = weights(engine)
    for version in range(2):
        with generator.awake(engine, version):
            assert generator.report.canary_mean < tolerance
        take(engine)
    loaded = {name: param.detach() for name, param in tiny_llama(hidden=64).named_parameters()}
    coarse = {name for name, tensor in before.items() if not torch.equal(tensor, loaded[name].to(tensor.dtype))}
    assert coarse == {name for name in loaded if "proj" in name}
    moved = {name for name, tensor in weights(engine).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in loaded if "q_proj" in name or "up_proj" in name}
    engine.save(tmp_path)
    fresh = make_engine(single_rank, recipe(stage), policy=load_policy(folder, asked), dtype=dtype)
    fresh.load(tmp_path)
    assert furthest(weights(fresh), weights(engine)) == 0.0
