import math
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from splits import Parts
from tiny import CPU, logp_and_entropy, ragged, tiny_policy

from rlpost.batch import make_batch
from rlpost.collect import shard
from rlpost.engine import Engine, Frozen, checkpoint_weights, deepspeed_config, lr_factor
from rlpost.errors import RunError
from rlpost.losses import ppo_clip, weighted_sum
from rlpost.metrics import Metrics
from rlpost.packing import Packer
from rlpost.recipe import EngineRecipe
from rlpost.update import update
from rlpost.weights import WeightStream

STAGES = (0, 1, 2, 3)
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
"""Of weights after a step in float32: sums run in another order."""

WINDOWS = [ragged(12, seed=0), ragged(5, seed=1)]
"""Two optimizer steps."""
SPLITS = {"1x12": Parts(1, 1, CPU, 12), "3x4": Parts(1, 1, CPU, 4), "12x1": Parts(1, 1, CPU, 1)}
PACKED = Packer(30, 20, CPU)


def recipe(stage=2, **changes):
    # With eps far above the gradient, Adam's first step is the gradient itself, to first order: nothing is hidden.
    return EngineRecipe(**({"zero_stage": stage, "lr": 0.3, "eps": 1.0, "grad_clip": 0.0} | changes))


def make_engine(world, asked, *, dtype="float32", temperature=1.0, seed=0, chunk=16):
    policy = tiny_policy(seed=seed, chunk=chunk, dtype=getattr(torch, dtype))
    return Engine(policy, asked, dtype=dtype, temperature=temperature, total_updates=4, world=world)


def policy_loss(engine, micro):
    logp_BT, _ = engine.token_logp(micro)
    loss_BT, _ = ppo_clip(logp_BT, micro.behavior_logp_BT, micro.adv_BT, clip_low=0.2, clip_high=0.28)
    return weighted_sum(loss_BT, micro.weight_BT, engine.world.size), {}


def take(engine, documents, packer=PACKED):
    """One optimizer step on this rank's documents, and the gradient's norm."""
    batch = make_batch(documents, packer, engine.world)
    return update(engine, batch, partial(policy_loss, engine), Metrics(engine.world))


def weights(engine):
    return {name: tensor.clone() for name, tensor in WeightStream(engine.deepspeed.module, bucket_bytes=1 << 20)}


def reference(windows, asked, temperature=1.0):
    """Plain torch, one document at a time, on the model's own logits: weights and gradient norms."""
    policy = tiny_policy()
    settings = {"lr": asked.lr, "betas": tuple(asked.betas), "eps": asked.eps, "weight_decay": asked.weight_decay}
    optimizer = torch.optim.AdamW(policy.parameters(), **settings)
    norms = []
    for documents in windows:
        optimizer.zero_grad()
        loss = sum(document_loss(policy, one, temperature) for one in documents)
        (loss / sum(one.num_trained for one in documents)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), asked.grad_clip or math.inf).item())
        optimizer.step()
    return {name: param.detach().clone() for name, param in policy.model.named_parameters()}, norms


def document_loss(policy, one, temperature):
    ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
    logp_TV = torch.log_softmax(policy.model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature, -1)
    logp_T = logp_TV.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(one.prompt_ids) - 1 :]
    behavior_T, adv_T = torch.tensor(one.behavior_logp), torch.full_like(logp_T, one.advantage)
    return ppo_clip(logp_T, behavior_T, adv_T, clip_low=0.2, clip_high=0.28)[0].sum()


def furthest(got, expected):
    assert got.keys() == expected.keys()
    return max(float((got[name].float() - tensor).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("split", [*SPLITS, "packed"])
def test_t1_t2_every_split_and_stage_takes_the_same_step(single_rank, split, stage):
    asked = recipe(stage)
    engine = make_engine(single_rank, asked)
    norm = take(engine, WINDOWS[0], SPLITS.get(split, PACKED))
    expected, [expected_norm] = reference(WINDOWS[:1], asked)
    torch.testing.assert_close(weights(engine), expected, **TOLERANCE)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert furthest(expected, dict(tiny_policy().model.named_parameters())) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_t3_t4_each_step_has_its_own_window_and_nothing_of_the_last(single_rank, stage):
    asked = recipe(stage)
    engine = make_engine(single_rank, asked)
    norms = [take(engine, WINDOWS[0], Parts(1, 1, CPU, 5)), take(engine, WINDOWS[1], Parts(1, 1, CPU, 4))]
    expected, expected_norms = reference(WINDOWS, asked)
    torch.testing.assert_close(weights(engine), expected, **TOLERANCE)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert engine.updates == 2 and engine.deepspeed.global_steps == 2


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_scales_the_gradient_and_reports_its_norm_before(single_rank, stage):
    asked = recipe(stage, grad_clip=0.05, weight_decay=0.1)
    engine = make_engine(single_rank, asked)
    norm = take(engine, WINDOWS[0])
    expected, [expected_norm] = reference(WINDOWS[:1], asked)
    assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 0.5
    torch.testing.assert_close(weights(engine), expected, **TOLERANCE)


def test_t16_the_engine_trains_at_the_sampling_temperature(single_rank):
    engine = make_engine(single_rank, recipe(), temperature=0.6)
    take(engine, WINDOWS[0])
    expected, _ = reference(WINDOWS[:1], recipe(), temperature=0.6)
    torch.testing.assert_close(weights(engine), expected, **TOLERANCE)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bfloat16_takes_nearly_the_same_step(single_rank, stage):
    engine = make_engine(single_rank, recipe(stage), dtype="bfloat16")
    norm = take(engine, WINDOWS[0])
    expected, [expected_norm] = reference(WINDOWS[:1], recipe())
    assert norm == pytest.approx(expected_norm, rel=0.05)
    assert furthest(weights(engine), expected) < 0.02
    assert {tensor.dtype for tensor in weights(engine).values()} == {torch.bfloat16}


def test_bfloat16_training_keeps_updates_smaller_than_its_rounding(single_rank):
    asked = recipe(lr=1e-6, eps=1e-8)
    engine = make_engine(single_rank, asked, dtype="bfloat16")
    for _ in range(3):
        take(engine, WINDOWS[0])
    from deepspeed.utils import safe_get_full_fp32_param

    param = engine.deepspeed.module.model.lm_head.weight
    assert float((safe_get_full_fp32_param(param) - param).abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(single_rank, stage, dtype):
    engine, other = (make_engine(single_rank, recipe(stage, weight_decay=0.1), dtype=dtype) for _ in range(2))

    def broken(micro):
        return engine.token_logp(micro)[0].sum() * math.inf, {}

    for one in (engine, other):
        take(one, WINDOWS[0])
    before = {name: tensor.clone() for name, tensor in weights(engine).items()}
    for in_a_row in (1, 2):
        norm = update(engine, make_batch(WINDOWS[0], PACKED, single_rank), broken, Metrics(single_rank))
        assert not math.isfinite(norm)
        assert (engine.skipped, engine.skipped_in_a_row) == (in_a_row, in_a_row)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())
    assert take(engine, WINDOWS[1]) == take(other, WINDOWS[1])  # nothing of it is left in moments or gradients either
    after = weights(other)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(engine).items())
    assert (engine.skipped, engine.skipped_in_a_row) == (2, 0)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_engine_resumes_exactly(single_rank, tmp_path, stage, dtype):
    asked = recipe(stage, schedule="linear", warmup_steps=2, lr=1e-2, eps=1e-8, grad_clip=1.0)
    first = make_engine(single_rank, asked, dtype=dtype)
    take(first, WINDOWS[0])
    first.save(tmp_path)
    norm = take(first, WINDOWS[1])
    second = make_engine(single_rank, asked, dtype=dtype, seed=5)
    second.load(tmp_path)
    assert second.updates == 1
    assert take(second, WINDOWS[1]) == norm
    assert (second.lr, second.updates) == (first.lr, first.updates) == (1e-2, 2)
    after = weights(first)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(second).items())


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32")])
def test_checkpoint_weights_are_the_policys(single_rank, tmp_path, stage, dtype):
    engine = make_engine(single_rank, recipe(stage), dtype=dtype)
    take(engine, WINDOWS[0])
    engine.save(tmp_path)
    found = checkpoint_weights(tmp_path)
    for name, tensor in weights(engine).items():
        assert torch.equal(found[f"model.{name}"].to(tensor.dtype), tensor)


def test_loading_from_an_empty_folder_says_what_to_do(single_rank, tmp_path):
    with pytest.raises(RunError, match=r"must hold an engine checkpoint \(it has no engine/meta.json\).*resume=never"):
        make_engine(single_rank, recipe()).load(tmp_path)


def cleared(world, stage, dtype):
    """Distances after the same step of an engine with a cleared, with a fresh and with a full optimizer."""
    asked = recipe(stage, schedule="linear", warmup_steps=3, lr=1e-2, eps=1e-8, weight_decay=0.1, grad_clip=1.0)
    first, second = ([one for _, one in shard(window, world.rank, world.size)] for window in WINDOWS)
    after = {}
    for name in ("cleared", "fresh", "full"):
        engine = make_engine(world, asked, dtype=dtype)
        group = engine.deepspeed.optimizer.param_groups[0]
        if name == "fresh":
            group["lr"] = 1e-2 * 2 / 3
        else:
            group["lr"] = 0.0  # moments, and weights as they were
            take(engine, first)
        if name == "cleared":
            engine.clear_optimizer()
        take(engine, second)
        after[name] = weights(engine)
        assert engine.lr == pytest.approx(1e-2 * 2 / 3), name
    return [furthest(after["cleared"], after[name]) for name in ("fresh", "full")]


STATES = [*((stage, "float32") for stage in STAGES), *((stage, "bfloat16") for stage in (1, 2, 3))]


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_a_cleared_optimizer_steps_like_a_fresh_one_at_the_same_place_of_the_schedule(single_rank, stage, dtype):
    to_fresh, to_full = cleared(single_rank, stage, dtype)
    assert to_fresh == 0.0 and to_full > 1e-3


def test_engine_follows_the_learning_rate_schedule(single_rank):
    engine = make_engine(single_rank, recipe(schedule="linear", warmup_steps=2, lr=0.01))
    seen = []
    for _ in range(4):
        take(engine, WINDOWS[1])
        seen.append(engine.lr)
    assert seen == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_lr_factor_matches_hand_table():
    cosine = partial(lr_factor, EngineRecipe(schedule="cosine", warmup_steps=1), total_steps=5)
    assert [cosine(step) for step in range(6)] == pytest.approx([1, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    plateau = partial(lr_factor, EngineRecipe(schedule="linear", decay_frac=0.5), total_steps=8)
    assert [plateau(step) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert lr_factor(EngineRecipe(), 10**6, 5) == 1.0
    assert lr_factor(EngineRecipe(schedule="linear", warmup_steps=9), 20, 5) == 0.0


def test_deepspeed_section_is_merged_over_the_configuration():
    own = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    config = deepspeed_config(EngineRecipe(zero_stage=3, deepspeed=own), "bfloat16", clip=True, numel=70)
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 70}
    assert config["wall_clock_breakdown"] is True and config["gradient_clipping"] == 1.0
    assert config["gradient_accumulation_steps"] == 1 and config["managed_gradient_accumulation"] is False


@pytest.mark.parametrize("stage", (2, 3))
def test_t33_t35_the_reference_gives_the_start_policys_log_probs_while_training_moves_on(single_rank, stage):
    frozen = Frozen(tiny_policy(), recipe(stage), dtype="float32", temperature=0.6, world=single_rank)
    engine = make_engine(single_rank, recipe(stage), temperature=0.6)
    micro = PACKED.micros(WINDOWS[0])[0]
    before, _ = engine.token_logp(micro)
    take(engine, WINDOWS[0])
    after, _ = engine.token_logp(micro)
    logp_BT = frozen.token_logp(micro)
    assert torch.equal(logp_BT, before.detach()) and not logp_BT.requires_grad
    assert float((after - before).abs().max()) > 0.01


def largest_gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def followed(world, folder, stage, dtype="float32"):
    """What a reference does that becomes a copy of the policy in training, is saved, and loaded by another."""
    folder = Path(folder) / f"{stage}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"dtype": dtype, "temperature": 0.6, "world": world}
    # Under ZeRO-3 vectors then stay on every rank once they were used, and matrices do not.
    partly = recipe(stage, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 1000}})

    def make_frozen(seed):
        return Frozen(tiny_policy(seed=seed, dtype=getattr(torch, dtype)), partly, **settings)

    mine = [one for _, one in shard(WINDOWS[0], world.rank, world.size)]
    micros = make_batch(mine, PACKED, world).micros

    def asked(frozen):
        return [frozen.token_logp(micro) for micro in micros]

    frozen, engine = make_frozen(3), make_engine(world, recipe(stage), dtype=dtype, temperature=0.6)
    start = asked(frozen)
    frozen.save(folder)
    silent = not list(folder.iterdir())
    take(engine, mine)
    frozen.follow(engine)
    with torch.no_grad():
        now = [engine.token_logp(micro)[0] for micro in micros]
    copy = asked(frozen)
    take(engine, mine)
    kept = asked(frozen)
    frozen.save(folder)
    again = make_frozen(4)
    asked(again)
    again.load(folder)
    untouched = make_frozen(3)
    untouched.load(folder / "empty")
    return {
        "moved": largest_gap(copy, start),
        "from_engine": largest_gap(copy, now),
        "from_itself": largest_gap(copy, kept),
        "after_load": largest_gap(copy, asked(again)),
        "without_file": largest_gap(start, asked(untouched)),
        "flags": [silent, frozen.followed, again.followed, not untouched.followed],
    }


def assert_followed(result):
    assert result["moved"] > 0.01
    assert result["from_engine"] == result["from_itself"] == result["after_load"] == result["without_file"] == 0.0
    assert all(result["flags"])


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_t35_a_reference_that_follows_has_the_policys_log_probs_now_later_and_after_loading(
    single_rank, tmp_path, stage, dtype
):
    assert_followed(followed(single_rank, tmp_path, stage, dtype))


def steps_on_two_ranks(world, cases):
    """For each stage, type and share of rank 0: distance to plain torch, norms, numbers of micro-batches."""
    expected, expected_norms = reference(WINDOWS, recipe(grad_clip=1.0))
    results = []
    for stage, dtype, share in cases:
        engine = make_engine(world, recipe(stage, grad_clip=1.0), dtype=dtype)
        own, norms, micros = slice(share) if world.is_main else slice(share, None), [], []
        for documents in WINDOWS:
            batch = make_batch(documents[own], PACKED, world)
            norms.append(update(engine, batch, partial(policy_loss, engine), Metrics(world)))
            micros.append((len(batch.micros), sum(bool(micro.mask_BT.any()) for micro in batch.micros)))
        distance = furthest(weights(engine), expected)
        results.append({"distance": distance, "norms": norms, "expected": expected_norms, "micros": micros})
    return results


def reference_on_two_ranks(world):
    """Distance of a sharded reference to the policy itself, asked between two updates of a sharded engine."""
    frozen = Frozen(tiny_policy(), recipe(3), dtype="float32", temperature=1.0, world=world)
    engine = make_engine(world, recipe(3))
    mine = [one for _, one in shard(WINDOWS[0], world.rank, world.size)]
    distance = 0.0
    for _ in range(2):
        for micro in make_batch(mine, PACKED, world).micros:
            logp_BT = frozen.token_logp(micro)
            own, _ = logp_and_entropy(tiny_policy(), micro)
            distance = max(distance, float((logp_BT - own).abs().max()))
        take(engine, mine)
    return distance


CASES = [(stage, "float32", share) for stage in STAGES for share in (9, 12)] + [
    (stage, "bfloat16", 9) for stage in (1, 2, 3)
]


def on_two_ranks(world, folder):
    return {
        "steps": steps_on_two_ranks(world, CASES),
        "reference": reference_on_two_ranks(world),
        "followed": [followed(world, folder, *state) for state in STATES],
        "cleared": [cleared(world, *state) for state in STATES],
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(on_two_ranks, folder=str(tmp_path_factory.mktemp("references")))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_t5_two_ranks_with_unequal_shares_take_the_same_step(two_ranks, case):
    (_, dtype, _), exact = case, case[1] == "float32"
    first, second = (rank["steps"][CASES.index(case)] for rank in two_ranks)
    for result in (first, second):
        assert result["distance"] < (2e-6 if exact else 0.02), dtype
        assert result["norms"] == pytest.approx(result["expected"], rel=1e-5 if exact else 0.15)
    # As many micro-batches on both, and both have work, though one of them came with little or nothing.
    assert [count for count, _ in first["micros"]] == [count for count, _ in second["micros"]]
    assert all(trained for rank in (first, second) for _, trained in rank["micros"])


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES, ids=str)
def test_t35_a_reference_on_two_ranks_follows_is_saved_and_loaded(two_ranks, state):
    for rank in two_ranks:
        assert_followed(rank["followed"][STATES.index(state)])


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_cleared_optimizer_on_two_ranks_steps_like_a_fresh_one(two_ranks, state):
    for rank in two_ranks:
        to_fresh, to_full = rank["cleared"][STATES.index(state)]
        assert to_fresh == 0.0 and to_full > 1e-3


@pytest.mark.slow
def test_t33_the_reference_sharded_over_two_ranks_gives_the_policys_log_probs(two_ranks):
    assert max(rank["reference"] for rank in two_ranks) < 1e-5
