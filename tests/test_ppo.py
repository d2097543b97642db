"""PPO from a recipe: a critic beside the policy, on one rank and two, from the first step and from a checkpoint."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from lab import logged, rlpost, train, train_here, weights
from test_train import steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PPO = ["algorithm.name=ppo", "tasks.eval=null"]
STEERED = [
    *("algorithm.name=prorl_v2", "algorithm.kl.reset.every=1", "algorithm.kl.coef=0.1", "algorithm.kl.target=0.01"),
    *("algorithm.kl.horizon=100", "algorithm.minibatches=2", "algorithm.entropy.target=3.0", "engine.lr=0.01"),
]


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
    toy = [*PPO, "sft=null", "steps=40", "rewards=[{use: 'mylab.rewards:sevens'}]", "engine.lr=0.01"]
    curve = train_here(lab, single_rank, "ppo-toy", *toy, "sampling.group_size=8")
    rewards = [line["reward/mean"] for line in curve]
    assert rewards[0] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.8
    errors = [line["critic/error"] for line in curve]
    print(rewards, errors)


def test_a_critic_trained_alone_leaves_the_policy_as_it_is(lab, single_rank) -> None:
    asked = ["algorithm.critic.pretrain_steps=2", "algorithm.kl.coef=0.001", "save_every=1", "keep_checkpoints=4"]
    curve = train_here(lab, single_rank, "ppo-alone", *PPO, *asked, "steps=4")
    assert [line["optim/steps"] for line in curve] == [0, 0, 1, 2]
    assert ["policy/loss" in line for line in curve] == [False, False, True, True]
    assert all(line["critic/grad_norm"] > 0 for line in curve)
    assert curve[2]["policy/kl_ref"] == 0 < curve[3]["policy/kl_ref"]
    assert curve[1]["critic/value"] != 0
    at = [weights(lab, "ppo-alone", step) for step in (1, 2, 3)]
    assert all(torch.equal(at[0][name], at[1][name]) for name in at[0])
    assert not all(torch.equal(at[1][name], at[2][name]) for name in at[0])


def test_a_critic_learns_to_foresee_the_reward(lab, single_rank) -> None:
    """The policy stands still, so that the returns do."""
    toy = [*PPO, "sft=null", "steps=30", "rewards=[{use: 'mylab.rewards:brevity', target: 24}]"]
    alone = ["algorithm.critic.pretrain_steps=29", "engine.lr=0.01", "sampling.group_size=8"]
    errors = [line["critic/error"] for line in train_here(lab, single_rank, "foresee", *toy, *alone)]
    print(errors)


@pytest.mark.parametrize(("name", "asked"), [("ppo", PPO), ("steered", STEERED)])
def test_a_killed_run_resumes_with_critic_reference_and_coefficients(lab, name: str, asked: list[str]) -> None:
    asked = [*asked, "generator.kind=hf", "tasks.eval=null"]
    checkpoints = lab / f"runs/{name}-killed/checkpoints"
    accident = f"SIGKILL:{checkpoints / 'step-000002'}"
    killed = rlpost(lab, "train", f"name={name}-killed", *asked, accident=accident)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-000002"]

    whole = train(lab, f"{name}-whole", *asked)
    assert train(lab, f"{name}-killed", *asked, "resume=auto") == whole == logged(lab, f"{name}-whole")
    a, b = (
        json.loads((lab / f"runs/{name}-{x}/checkpoints/step-000004/manifest.json").read_text())["files"]
        for x in ("killed", "whole")
    )
    print({k: a[k] == b[k] for k in a})
    for w in whole:
        print({k: v for k, v in w.items() if k.startswith(("policy", "critic", "optim"))})
