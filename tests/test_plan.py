"""`rlpost check --plan`: its figures on recipes worked out by hand, its advice, and its output."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlpost.__main__ import FAILED, main
from rlpost.check import load_and_check
from rlpost.devices import DEVICES, GIB, Device, find_device
from rlpost.model_shape import model_sizes
from rlpost.plan import PROMPT_GUESS, make_plan, prompt_length, step_of
from rlpost.plan_report import advice, bound, report
from rlpost.types import Task
from rlpost.widths import lr_scale
from tests.bench.plan import compare, measured, table
from tests.tiny import write_folder

RECIPE = "recipes/quickstart.yaml"
CPU = Device("cpu", 16.0, {"float32": 1e11}, 1e10, is_gpu=False)
SIZES = "hidden_size: 1024, intermediate_size: 4096, num_layers: 24, num_heads: 16"
WIDE = f"{{tokenizer: char, alphabet: '0123456789+-=;#', {SIZES}}}"


def planned(*overrides, device=CPU, ranks=1, chars=10):
    recipe = load_and_check(RECIPE, overrides)
    return make_plan(recipe, device, [Task(key="", prompt="x" * chars, answer="")], ranks=ranks)


def test_parameters_are_those_of_the_quickstart_model() -> None:
    plan = planned()
    assert plan.params == {
        "embedding": 17 * 128,
        "attention": 3 * 4 * 128**2,
        "MLP": 3 * 3 * 128 * 384,
        "norm": 7 * 128,
    }
    assert plan.total == 642_048


def test_a_head_counts_once_where_it_is_tied(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    for tie in (True, False):
        folder = write_folder(tmp_path / str(tie), tie=tie)
        _, params = model_sizes(load_and_check(RECIPE, [f"model.path={folder}", "model.init=null"]))
        real = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(params.values()) == sum(param.numel() for param in real.parameters())
        assert ("head" in params) == (not tie)


def test_a_model_that_cannot_be_planned_is_refused(tmp_path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="must be a dense decoder with gated MLPs for --plan"):
        model_sizes(replaced_path(tmp_path))


def test_a_model_without_configuration_is_told(tmp_path) -> None:
    with pytest.raises(Exception, match=r"model\.path must have a config\.json that can be read or fetched"):
        model_sizes(replaced_path(tmp_path))


def replaced_path(folder):
    recipe = load_and_check(RECIPE)
    recipe.model = replace(recipe.model, path=str(folder), init=None)
    return recipe


def test_prompts_are_measured_in_characters_or_guessed() -> None:
    recipe = load_and_check(RECIPE, ["tasks.prompting.prefix=1234", "tasks.prompting.suffix=56"])
    tasks = [Task(key="", prompt="x" * n, answer="") for n in (10, 30)]
    assert prompt_length(recipe, tasks) == 26  # a token a character
    assert prompt_length(replaced_path("anywhere"), tasks) == 20 // 4
    assert prompt_length(recipe, []) == PROMPT_GUESS


def test_tokens_and_micro_batches_follow_the_recipe() -> None:
    plan = planned("sampling.max_new_tokens=40", "batch.row_tokens=128", "batch.micro_tokens=512")
    assert (plan.rollouts, plan.expected.completion, plan.worst.completion) == (512, 20, 40)
    assert (plan.expected.generated, plan.worst.generated) == (10_240, 20_480)
    assert plan.expected.micros == 32  # 4 documents of 30 in a row of 120, 4 rows in a micro-batch, 512 documents
    assert planned("batch.micro_tokens=512", "algorithm.minibatches=4").expected.micros == 8
    assert planned("algorithm.minibatches=4", "algorithm.epochs=2").updates == 8
    assert planned(ranks=2).rollouts == 256


def test_flops_of_a_step_are_those_of_the_formulas() -> None:
    plan = planned("batch.row_tokens=30", "batch.micro_tokens=30")
    per_position = 2 * (196_608 + 442_368)
    pairs, logits = 512 * 30**2, 512 * 20
    attention, head = 4 * 3 * 128 * pairs, 2 * 128 * 17 * logits
    forward = per_position * 512 * 30 + attention + head
    assert plan.expected.flops["train"] == 3 * forward + attention // 2 + head
    assert plan.expected.across_frac == 0


@pytest.mark.parametrize(
    ("overrides", "scored_by"),
    [
        ([], ()),
        (["algorithm.kl.coef=0.01"], ("reference",)),
        (["algorithm.mismatch.mode=decoupled", "algorithm.minibatches=2"], ("policy",)),
        (["algorithm.name=ppo"], ("critic",)),
    ],
)
def test_scoring_passes_are_those_the_algorithm_asks_for(overrides, scored_by) -> None:
    plan, alone = planned(*overrides), planned()
    assert plan.scored_by == scored_by
    assert (plan.expected.flops["score"] > 0) == bool(scored_by)
    assert (plan.expected.flops["train"] > alone.expected.flops["train"]) == ("critic" in scored_by)
    assert (plan.memory["moments"] > alone.memory["moments"]) == ("critic" in scored_by)
    assert ("reference" in plan.memory) == ("reference" in scored_by)


@pytest.mark.parametrize(
    ("stage", "bytes_a_parameter"), [(1, 2 + 6 + 4 / 4 + 8 / 4), (2, 2 + 16 / 4), (3, (2 + 16) / 4)]
)
def test_training_state_is_that_of_the_zero_stage(stage, bytes_a_parameter) -> None:
    plan = planned("model.dtype=bfloat16", f"engine.zero_stage={stage}", device=DEVICES["h100"], ranks=4)
    state = sum(plan.memory[part][1] for part in ("weights", "gradients", "master copy", "moments"))
    assert state == 642_048 * bytes_a_parameter


def test_gradient_bucket_is_held_by_stage_three_and_follows_its_setting() -> None:
    bucket = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    overrides = ("model.dtype=bfloat16", "engine.park=none", bucket)
    for stage, held in ((1, (0, 0)), (2, (0, 2000)), (3, (2000, 2000))):
        plan = planned(*overrides, f"engine.zero_stage={stage}", device=DEVICES["h100"])
        assert plan.memory["gradient bucket"] == held
    assert planned(device=DEVICES["h100"]).memory["gradient bucket"] == (0, 4 * 500_000_000)
    assert planned().memory["gradient bucket"] == (0, 0)


def test_offload_moves_master_copy_and_moments_off_a_gpu_only() -> None:
    overrides = ("model.dtype=bfloat16", "engine.offload_optimizer=true")
    on_gpu, on_cpu = planned(*overrides, device=DEVICES["a100"]), planned(*overrides)
    assert on_gpu.memory["moments"] == on_gpu.memory["master copy"] == (0, 0)
    assert on_cpu.memory["moments"] == (8 * 642_048,) * 2


def test_what_is_parked_or_offloaded_takes_nothing_of_a_gpu_then() -> None:
    overrides = ("model.dtype=bfloat16", "engine.zero_stage=3", "algorithm.kl.coef=0.01")
    parts = ("weights", "gradients", "master copy", "moments", "gradient bucket", "reference")

    def taken(*more, device=DEVICES["h100"]):
        """Parts that are on the device while generating, and while training."""
        memory = planned(*overrides, *more, device=device).memory
        return [{part for part in parts if memory[part][place]} for place in (0, 1)]

    everything, weights = set(parts), {"weights", "reference"}
    assert taken() == taken("engine.park=optimizer") == [weights, everything]
    assert taken("engine.park=none") == taken("generator.sleep_level=0") == [everything, everything]
    assert taken("engine.park=all") == [set(), everything]
    on_host = "engine.offload_optimizer=true", "engine.offload_params=true"
    assert taken(*on_host) == [{"gradients", "gradient bucket"}] * 2
    assert taken("engine.park=all", device=CPU) == [everything - {"gradient bucket"}] * 2


def test_generator_takes_its_share_and_sleeps_on_a_gpu() -> None:
    gpu = DEVICES["l40s"]
    share = int(0.5 * gpu.memory_gib * GIB)
    for level, parked in ((1, 0), (0, share)):
        plan = planned("generator.memory_frac=0.5", f"generator.sleep_level={level}", device=gpu)
        assert plan.memory["generator"] == (share, parked)
    plan = planned("generator.kv_cache_gib=1")
    assert plan.memory["generator"] == (GIB + 4 * 642_048,) * 2


def test_checkpointing_keeps_less() -> None:
    kept = [planned(f"model.gradient_checkpointing={on}").memory["activations"][1] for on in ("true", "false")]
    # 8192 positions, 3 layers, float32: two norms of 12 D, attention 16 D, the MLP 16 x 3 D; a layer's input 4 D
    assert kept == [8192 * 128 * (3 * 4 + 88), 8192 * 128 * 3 * 88]


def test_the_cache_bounds_how_many_decode_at_once() -> None:
    # 2 x 3 layers x 128 x 4 bytes a position, 10 + 40 positions: 153,600 bytes an answer
    plan = planned("generator.kv_cache_gib=0.01")
    assert plan.sequence_room == plan.expected.concurrency == int(0.01 * GIB) // 153_600
    [said] = [line for line in advice(plan) if "decode at once" in line]
    assert said == "69 of 512 answers of full length decode at once: raise generator.kv_cache_gib to 0.0732"
    assert planned(said.rpartition(" ")[0].split()[-2] + "=0.0735").sequence_room >= 512
    assert planned("generator.max_num_seqs=64").expected.concurrency == 64
    assert any("raise generator.max_num_seqs to 512" in line for line in advice(planned("generator.max_num_seqs=64")))


def test_seconds_are_work_over_the_rates_that_are_counted_on() -> None:
    plan = planned()
    faster = make_plan(plan.recipe, replace(CPU, rate={"float32": 2e11}), [], ranks=1)
    faster = replace(faster, prompt=plan.prompt)
    assert plan.expected.seconds["train"] == pytest.approx(plan.expected.flops["train"] / (0.4 * 1e11))
    assert faster.expected.seconds["train"] == pytest.approx(plan.expected.seconds["train"] / 2)
    assert bound(plan.expected) == "train"
    assert step_of(plan, 30).flops["decode"] > plan.expected.flops["decode"]


def test_reading_weights_bounds_a_large_model_with_few_answers() -> None:
    overrides = (f"model.init={WIDE}", "model.dtype=bfloat16", "sampling.group_size=2", "prompts_per_step=1")
    plan = planned(*overrides, device=replace(DEVICES["h100"], bandwidth=1e10))
    assert bound(plan.expected) == "decode: reading weights and cache"
    assert any("more sampling.group_size or prompts_per_step" in line for line in advice(plan))


@pytest.mark.parametrize(
    ("overrides", "memory_gib", "ranks", "key"),
    [
        (["batch.micro_tokens=65536"], 0.4, 1, "model.gradient_checkpointing=true, or lower batch.micro_tokens"),
        (
            ["batch.micro_tokens=65536", "model.gradient_checkpointing=true"],
            0.15,
            1,
            "lower batch.micro_tokens from 65536",
        ),
        (["model.logp_chunk=32000000"], 5.0, 1, "lower model.logp_chunk from 32000000"),
        (["generator.memory_frac=0.97"], 8.0, 1, "lower generator.memory_frac to 0."),
        ([f"model.init={WIDE}"], 2.0, 1, "engine.offload_optimizer=true"),
        ([f"model.init={WIDE}"], 2.0, 2, "engine.zero_stage=3 shards"),
    ],
)
def test_what_does_not_fit_names_the_key_to_change(overrides, memory_gib, ranks, key) -> None:
    gpu, small = replace(DEVICES["h100"], memory_gib=memory_gib), "{zero_optimization: {reduce_bucket_size: 1000}}"
    overrides = ["model.dtype=bfloat16", "engine.park=none", f"engine.deepspeed={small}", *overrides]
    said = list(advice(planned(*overrides, device=gpu, ranks=ranks)))
    assert any("does not fit" in line and key in line for line in said), said


def test_the_fraction_advised_for_the_generator_fits() -> None:
    gpu = replace(DEVICES["h100"], memory_gib=8.0)
    [line] = [line for line in advice(planned("generator.memory_frac=0.97", device=gpu)) if "does not fit" in line]
    fraction = line.rpartition(" ")[2]
    fixed = planned(f"generator.memory_frac={fraction}", device=gpu)
    assert not any("does not fit" in line for line in advice(fixed))


def test_check_prints_the_plan_in_eighty_columns(capsys) -> None:
    assert main(["check", RECIPE, "--plan", "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan of quickstart: 1 x h100")
    assert max(map(len, printed.splitlines())) <= 80
    assert "PREDICTION" in printed
    assert printed.index("advice") > printed.index("bound by")


def test_report_says_where_a_phase_does_not_fit() -> None:
    small = planned(device=replace(CPU, memory_gib=1.2))
    assert "DOES NOT FIT" in report(small)
    assert "DOES NOT FIT" not in report(planned())


def test_a_plan_that_cannot_be_made_is_an_error_and_no_stack(capsys, tmp_path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    assert main(["check", RECIPE, f"model.path={folder}", "model.init=null", "--plan", "--device", "h100"]) == FAILED
    assert "model.path must have a config.json" in capsys.readouterr().err


def test_a_cpu_is_measured_and_shared_between_ranks() -> None:
    alone = find_device("cpu", "float32", ranks=1)
    assert not alone.is_gpu
    assert alone.memory_gib == pytest.approx(2 * find_device("cpu", "float32", ranks=2).memory_gib)
    assert 1e8 < alone.rate["float32"] < 1e14
    assert 1e8 < alone.bandwidth < 1e13
    assert find_device("a100", "float32", ranks=2) == DEVICES["a100"]


def test_bench_compares_the_plan_at_the_length_of_the_run(tmp_path) -> None:
    plan, file = planned(), tmp_path / "metrics.jsonl"
    step = {"time/generate_s": 2.0, "time/train_s": 4.0, "tokens/generated": 512.0 * 30, "rollouts/length_mean": 30.0}
    lines = [{"eval/pass@1": 0.5}, {**step, "time/train_s": 100.0}, step, {**step, "time/train_s": 5.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = measured(file)
    assert run == {"generate": 2.0, "score": 0.0, "train": 4.5, "generated": 15_360.0, "completion": 30.0}
    result = compare(plan, run)
    assert result["planned"]["completion"] == 20
    assert result["ratio"]["generated"] == 1
    seconds = step_of(plan, 30).seconds
    assert result["ratio"]["train"] == pytest.approx((seconds["train"] + seconds["optimizer"]) / 4.5)
    assert f"| {result['ratio']['train']:.2f} |" in table({"here": result}).splitlines()[2]


def test_a_wide_group_costs_its_width_and_trains_its_sample() -> None:
    wide = "explore=[{use: broaden, width: 128, train: 32}]"
    plan, narrow = planned(wide), planned("sampling.group_size=32")
    assert (plan.rollouts, plan.trained_rollouts) == (32 * 128, 32 * 32)
    assert plan.expected.flops["decode"] == 4 * narrow.expected.flops["decode"]
    assert plan.expected.flops["train"] == narrow.expected.flops["train"]
    assert planned(wide, "algorithm.minibatch_rollouts=256").updates == 4


def test_the_learning_rate_grows_with_the_root_of_the_batch() -> None:
    wide = ["explore=[{use: broaden, width: 64}]", "engine.lr_rollouts=512"]
    assert lr_scale(load_and_check(RECIPE, wide)) == 2.0  # 32 x 64 over 512
    assert lr_scale(load_and_check(RECIPE, ["engine.lr_rollouts=512"])) == 1.0
    assert lr_scale(load_and_check(RECIPE)) == 1.0
