"""PPO from a recipe: a critic beside the policy, on one rank and two, from the first step and from a checkpoint."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from lab import rlpost, train, train_here, weights
from test_train import steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PPO = ["algorithm.name=ppo", "tasks.eval=null"]
STEERED = [
    *("algorithm.name=prorl_v2", "algorithm.minibatches=2", "algorithm.entropy.target=3.0", "engine.lr=0.01"),
    *("algorithm.kl={coef: 0.1, target: 0.01, horizon: 100, reset: {every: 2}}", "tasks.eval=null"),
]
"""A reference that is renewed, a KL and an entropy coefficient that move."""


def test_ppo_has_the_same_curve_on_one_rank_and_on_two_of_zero3(lab) -> None:
    """With a seed a request the rollouts are the same; sums over ranks differ by float32 rounding."""
    shared = [*PPO, "generator.seeding=request", "engine.zero_stage=3", "steps=3"]
    one, two = steps(train(lab, "ppo-one", *shared)), steps(train(lab, "ppo-two", *shared, ranks=2))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours["reward/mean"] == pytest.approx(theirs["reward/mean"], abs=1e-9)
        assert ours["tokens/trained"] == theirs["tokens/trained"]
        for name in ("policy/loss", "critic/loss", "critic/value", "critic/return", "critic/error"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
        for name in ("optim/grad_norm", "critic/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_policy_and_critic_learn_what_is_easy_to_learn(lab, single_rank) -> None:
    toy = [*PPO, "sft=null", "steps=25", "rewards=[{use: 'mylab.rewards:sevens'}]", "engine.lr=0.01"]
    curve = train_here(lab, single_rank, "ppo-toy", *toy, "sampling.group_size=8")
    rewards = [line["reward/mean"] for line in curve]
    assert rewards[0] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.8
    errors = [line["critic/error"] for line in curve]
    assert max(errors) > 0.4  # while the policy runs ahead of it
    assert sum(errors[-5:]) / 5 < 0.2


def test_a_critic_trained_alone_foresees_the_reward(lab, single_rank) -> None:
    """A constant would be wrong by a half: 1 or 0 are as frequent, and the prompt says which it will be."""
    toy = [*PPO, "sft=null", "steps=26", "prompts_per_step=32", "sampling={group_size: 1, max_new_tokens: 4}"]
    alone = ["rewards=[{use: 'mylab.rewards:foreseeable'}]", "algorithm.critic={pretrain_steps: 25, lr: 0.002}"]
    curve = train_here(lab, single_rank, "foresee", *toy, *alone)
    assert all(0.25 < line["critic/return"] < 0.75 for line in curve)
    assert sum(line["critic/error"] for line in curve[-5:]) / 5 < 0.1


def test_a_critic_trained_alone_leaves_the_policy_as_it_is(lab, single_rank) -> None:
    asked = ["algorithm.critic.pretrain_steps=2", "algorithm.kl.coef=0.001", "save_every=1", "keep_checkpoints=4"]
    curve = train_here(lab, single_rank, "ppo-alone", *PPO, *asked, "steps=4")
    assert [line["optim/steps"] for line in curve] == [0, 0, 1, 2]
    assert ["policy/loss" in line for line in curve] == [False, False, True, True]
    assert all(line["critic/grad_norm"] > 0 for line in curve)
    assert curve[0]["critic/value"] == 0 != curve[1]["critic/value"]
    assert curve[2]["policy/kl_ref"] == 0 < curve[3]["policy/kl_ref"]
    at = [weights(lab, "ppo-alone", step) for step in (1, 2, 3)]
    assert all(torch.equal(at[0][name], at[1][name]) for name in at[0])
    assert not any(torch.equal(at[1][name], at[2][name]) for name in at[0])


@pytest.mark.parametrize(
    ("name", "asked", "folders"), [("ppo", PPO, {"engine", "critic"}), ("steered", STEERED, {"engine", "reference"})]
)
def test_a_killed_run_resumes_with_critic_reference_and_coefficients(lab, name: str, asked, folders) -> None:
    asked = [*asked, "generator.kind=hf", "steps=5", "save_every=3"]
    checkpoints = lab / f"runs/{name}-killed/checkpoints"
    killed = rlpost(lab, "train", f"name={name}-killed", *asked, accident=f"SIGKILL:{checkpoints / 'step-000003'}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000003"]

    whole = train(lab, f"{name}-whole", *asked)
    assert len(whole) == 5
    assert train(lab, f"{name}-killed", *asked, "resume=auto") == whole
    if name == "steered":
        assert [line["policy/ref_resets"] for line in whole] == [0, 0, 1, 1, 2]
        assert len({line["policy/kl_coef"] for line in whole}) == 5
    killed_files, whole_files = (files(lab, f"{name}-{how}", 5) for how in ("killed", "whole"))
    assert {file.partition("/")[0].partition(".")[0] for file in whole_files} >= folders
    assert killed_files == whole_files


def files(lab, name: str, step: int) -> dict[str, str]:
    """The checksum of every file of weights and moments in a checkpoint."""
    manifest = json.loads((lab / f"runs/{name}/checkpoints/step-{step:06d}/manifest.json").read_text())
    ours = ("engine/", "critic/", "reference")
    return {file: entry["sha256"] for file, entry in manifest["files"].items() if file.startswith(ours)}
