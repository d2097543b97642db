"""`rlpost check --dry-run`: the micro-batch it makes, real steps of real engines, and what it leaves behind."""

from __future__ import annotations

import resource
import tempfile
from dataclasses import replace

import pytest
import torch
from tiny import CPU, write_folder

from rlpost import dry_run as trials
from rlpost import flops
from rlpost.__main__ import FAILED, main
from rlpost.check import load_and_check
from rlpost.devices import Device
from rlpost.dry_run import (
    FORWARD,
    REMEDY,
    Trial,
    Watch,
    bounded_memory,
    report,
    start_folder,
    training_bytes,
    worst_documents,
)
from rlpost.errors import RunError
from rlpost.packing import Packer
from rlpost.plan import UTILISATION, make_plan, micro_seconds
from rlpost.world import World

RECIPE = "recipes/quickstart.yaml"
SMALL = (
    "model.init={tokenizer: char, alphabet: '0123456789+-=;#', hidden_size: 64, intermediate_size: 64, num_layers: 2, "
    "num_heads: 2}"
)
SIZES = ("model.context=48", "batch.micro_tokens=256", "batch.row_tokens=112", "sampling.max_new_tokens=24")
MIB = 1 << 20


@pytest.fixture
def command(single_rank, tmp_path, monkeypatch):
    """The command line, in the process group of the other tests; temporary folders stand in that of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(World, "stop", lambda self: None)
    return main


@pytest.fixture
def engines(monkeypatch):
    """The engines that a dry run makes, and their weights before it."""
    kept = []

    def make(*args):
        parts = make_engines(*args)
        for part in (parts[0], parts[2]):
            if part is not None:
                kept.append((part, [param.detach().clone() for param in part.deepspeed.module.parameters()]))
        return parts

    make_engines = trials.make_engines
    monkeypatch.setattr(trials, "make_engines", make)
    return kept


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.zero_stage=0"],
        ["algorithm.name=ppo", "algorithm.kl.coef=0.01", "model.gradient_checkpointing=true"],
        ["algorithm.name=prorl_v2", "model.dtype=bfloat16", "model.head_dtype=float32"],
    ],
)
def test_a_dry_run_steps_every_engine_and_leaves_nothing(overrides, command, engines, tmp_path, capsys):
    run_dir = f"run_dir={tmp_path / 'runs'}"
    assert command(["check", RECIPE, run_dir, "steps=8", SMALL, *SIZES, *overrides, "--dry-run"]) == 0
    assert len(engines) == 1 + ("algorithm.name=ppo" in overrides)
    for engine, before in engines:
        assert engine.updates == trials.ROUNDS
        after = list(engine.deepspeed.module.parameters())
        assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("rlpost*"))
    printed = capsys.readouterr().out
    assert printed.startswith("dry run: 2 x 112 positions, documents of up to 48, 218 trained tokens")
    assert all(f"\n{part} " in printed for part in REMEDY)
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("context", "row_tokens", "micro_tokens", "shape", "lengths"),
    [
        (48, 112, 256, (2, 112), [48, 48, 16] * 2),
        (200, 112, 450, (2, 200), [200, 200]),
        (200, 112, 100, (1, 200), [200]),
        (56, 113, 113, (1, 112), [56, 56]),
    ],
)
def test_documents_fill_the_rows_of_one_micro_batch(context, row_tokens, micro_tokens, shape, lengths):
    asked = (f"model.context={context}", f"batch.row_tokens={row_tokens}", f"batch.micro_tokens={micro_tokens}")
    recipe = load_and_check(RECIPE, [*asked, "sampling.max_new_tokens=24"])
    documents = worst_documents(recipe, context, 17)
    assert [one.length for one in documents] == lengths
    [micro] = Packer(micro_tokens, min(row_tokens, micro_tokens), CPU, share_prompts=True).micros(documents)
    assert tuple(micro.tokens_BT.shape) == shape
    assert int(micro.mask_BT.sum()) == sum(lengths) - len(lengths)
    assert bool((micro.adv_BT[micro.mask_BT] != 0).all())


def test_memory_that_runs_out_names_the_keys_to_lower(monkeypatch):
    recipe = load_and_check(RECIPE, ["batch.micro_tokens=4096", "model.logp_chunk=77"])
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(trials, "free_bytes", lambda: 64 * MIB)
    watch = Watch(recipe, World())
    with pytest.raises(RunError) as error, bounded_memory(World()), watch(FORWARD):
        torch.ones(256 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit
    for words in ("(forward and loss did not", "batch.micro_tokens from 4096", "model.logp_chunk from 77"):
        assert words in str(error.value)
    assert "model.gradient_checkpointing=true (it is false)" in str(error.value)
    with pytest.raises(RuntimeError, match="shapes"), watch(FORWARD):  # a bug stays one
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_a_recipe_that_does_not_fit_is_one_message_and_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "free_bytes", lambda: 256 * MIB)
    large = ("model.context=4096", "batch.micro_tokens=65536", "model.attention=eager")
    assert command(["check", RECIPE, f"run_dir={tmp_path / 'runs'}", SMALL, *large, "--dry-run"]) == FAILED
    said = capsys.readouterr().err
    assert said.startswith("error: the worst micro-batch must fit the memory of cpu (")
    assert "lower batch.micro_tokens from 65536" in said
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("rlpost*"))


def test_weights_that_are_not_here_are_made_up_and_no_others(tmp_path):
    folder = write_folder(tmp_path / "model")
    recipe = load_and_check(RECIPE, [f"model.path={folder}", "model.init=null"])
    assert start_folder(recipe, tmp_path / "scratch", World()) == folder
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    made = start_folder(recipe, tmp_path / "scratch", World())
    assert made.is_relative_to(tmp_path / "scratch")
    assert list(made.glob("*.safetensors")) and not list(folder.glob("*.safetensors"))


def planned(**device):
    cpu = Device("cpu", 16.0, {"float32": 1e11}, 1e10, is_gpu=False)
    return make_plan(load_and_check(RECIPE), replace(cpu, **device), [], ranks=1)


def test_the_plans_seconds_are_those_of_the_micro_batch_alone():
    plan, positions, pairs, logits = planned(), 64, 2 * 32**2, 60
    counts = {"positions": positions, "pairs": pairs, "logits": logits}
    forward = flops.forward_flops(plan.shape, **counts)
    backward = flops.backward_flops(plan.shape, **counts, fused_attention=True, logits_again=True)
    seconds = micro_seconds(plan, [32, 32], [16, 16, 16, 16])
    assert seconds["score"] == pytest.approx(forward / (UTILISATION * 1e11))
    assert seconds["train"] == pytest.approx((forward + backward) / (UTILISATION * 1e11))


def trial(peak_gib=2.0):
    return Trial([32, 32], [32, 32], 62, dict.fromkeys(REMEDY, 1.5), dict.fromkeys(REMEDY, peak_gib), 0.5, "memory", 2)


def test_report_stands_beside_the_plan_and_says_whether_the_generator_has_room():
    text = report(trial(), planned())
    both = next(line for line in text.splitlines() if line.startswith("forward and backward")).split()
    assert both[-4] == "3" and both[-2] == "1.50"
    assert float(both[-1]) == pytest.approx(training_bytes(planned(), 32) / (1 << 30), abs=0.01)
    assert text.rstrip().endswith("3.00 of 15.20 that may be used: fits")
    assert "DOES NOT FIT: lower batch.micro_tokens from" in report(trial(), planned(memory_gib=3.0))


def test_report_without_a_plan_has_what_was_measured():
    text = report(trial(), None)
    assert "may be used" not in text
    assert "load                                     1.5           -        1.50           -" in text
