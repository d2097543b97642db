"""The supervised part: made once, kept under what shaped it."""

from __future__ import annotations

import json

import pytest
from lab import base_model, rlpost

from rlpost.recipe import Sft, load
from rlpost.sft import TARGET_STEPS, on_target, shaped_by

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_base_model_is_made_once_and_then_found(lab) -> None:
    folder = base_model(lab)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    done = rlpost(lab, "sft")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"model: {folder}")
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_loss_of_the_supervised_part_falls(lab) -> None:
    folder = base_model(lab)
    losses = [json.loads(line)["policy/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_what_shapes_the_base_model_changes_its_name_and_nothing_else_does(lab) -> None:
    def shape(*overrides: str) -> str:
        recipe = load(lab / "tiny.yaml", overrides)
        assert recipe.sft is not None
        return json.dumps(shaped_by(recipe, recipe.sft), sort_keys=True)

    assert shape("steps=9", "engine.lr=1", "rewards=[{use: exact_chain}]") == shape()
    for change in ("sft.lr=0.5", "seed=1", "model.context=48", "sft.tasks.config.size=65", "engine.grad_clip=2"):
        assert shape(change) != shape(), change


def test_training_to_a_target_ends_with_the_first_steps_whose_mean_loss_is_so_low() -> None:
    asked = Sft(target_loss=0.5)
    assert not on_target(asked, [0.1] * (TARGET_STEPS - 1))
    assert not on_target(asked, [0.5] * (TARGET_STEPS - 1) + [0.6])
    assert on_target(asked, [0.4] * (TARGET_STEPS - 1) + [0.6])
    assert not on_target(Sft(), [0.0] * TARGET_STEPS)
