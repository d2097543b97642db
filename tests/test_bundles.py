"""Every algorithm of the table, and what a recipe can put in its place, from the first line of a run to the last."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from lab import train, train_here, weights

from rlpost.algorithms import ALGORITHMS
from rlpost.algorithms_explore import EXPLORING
from rlpost.errors import RunError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EVERY_STEP = {"reward/mean", "policy/loss", "policy/entropy", "optim/grad_norm", "mismatch/k3", "groups/waves"}
RESET_TWICE = ["algorithm.name=prorl_v2", "algorithm.kl.reset.every=2", "engine.lr=0.01", "steps=4"]
RESET_TWICE += ["logging.noise_every=0"]  # which would train micro-batches that are not those that were scored
OWN_LOSS = "algorithm.loss={use: 'mylab.losses:cispo_two_sided', high: 0.28}"


@pytest.fixture
def here(lab, single_rank):
    """Train in this process with the plain generator."""

    def run(name: str, *overrides: str) -> list[dict]:
        return train_here(lab, single_rank, name, *overrides)

    return run


def rows(curve: list[dict]) -> list[dict]:
    """The lines of training steps, all of them whole, finite and with a gradient."""
    steps = [line for line in curve if "reward/mean" in line]
    assert [line["step"] for line in steps] == list(range(len(steps)))
    for line in steps:
        assert line.keys() >= EVERY_STEP, EVERY_STEP - line.keys()
        assert all(map(math.isfinite, line.values())), line
        assert line["optim/grad_norm"] > 0
    return steps


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("vapo", "prorl_v2", *EXPLORING)])
def test_every_algorithm_trains_from_its_name_alone(here, name: str) -> None:
    curve = rows(here(f"named-{name}", f"algorithm.name={name}", "steps=2"))
    minibatches = ALGORITHMS[name].section.get("minibatches", 1)
    assert [line["optim/steps"] for line in curve] == [minibatches, 2 * minibatches]
    for line in curve:
        assert line["groups/trained"] == 4
        assert ("critic/loss" in line) == (name == "ppo")
        assert ("policy/kl_ref" in line) == (name == "reinforce_pp")
        assert ("curriculum/retired" in line) == (name == "scalerl")
        assert ("reward/length_bonus" in line) == (name in ("dapo", "kimi_k15"))


def test_vapo_trains_with_vllm_after_its_critic(lab) -> None:
    first, *others = [line for line in train(lab, "vapo", "algorithm.name=vapo") if "reward/mean" in line]
    assert "policy/loss" not in first
    assert first["critic/grad_norm"] > 0
    assert first["optim/steps"] == 0
    assert [line["optim/steps"] for line in others] == [1, 2, 3]
    for line in others:
        assert {"policy/loss", "critic/loss", "critic/value", "critic/return", "critic/error"} <= line.keys()


def test_prorl_v2_trains_with_vllm_and_resets_its_reference(lab) -> None:
    curve = rows(train(lab, "prorl", *RESET_TWICE))
    assert [line["policy/ref_resets"] for line in curve] == [0, 0, 1, 1]
    kl = [line["policy/kl_ref"] for line in curve]
    assert kl[0] == kl[2] == 0  # the reference is what is trained, to the last bit
    assert kl[1] > 1e-4 < kl[3]
    assert {"policy/kl_coef", "mismatch/age_0/k3", "rollouts/discarded", "tokens/discarded"} <= curve[0].keys()


def test_refill_generates_until_enough_groups_have_spread(here) -> None:
    """The share of sevens is often 0 in a whole group, so that one wave is not enough."""
    rare = ["rewards=[{use: 'mylab.rewards:sevens'}]", "sampling.group_size=2", "sampling.max_new_tokens=8"]
    curve = rows(here("refill", *rare, "algorithm.name=dapo", "steps=3"))
    assert max(line["groups/waves"] for line in curve) > 1
    for line in curve:
        assert line["groups/trained"] == 4
        assert line["rollouts/discarded"] == 2 * (line["groups/num"] - 4) > 0
        assert line["tokens/trained"] == line["tokens/generated"] - line["tokens/discarded"]
    dropped = here("drop", *rare, "algorithm.name=grpo", "steps=3")
    assert {line["groups/waves"] for line in dropped} == {1}
    assert min(line["groups/trained"] for line in dropped) < 4


def test_a_users_loss_and_a_greedy_baseline_train_with_vllm(lab) -> None:
    asked = ["algorithm.advantage=remax", OWN_LOSS, "algorithm.minibatches=2", "sampling.group_size=1"]
    asked += ["algorithm.groups.without_spread=keep", "tasks.eval=null", "engine.lr=0.01", "steps=2"]
    curve = rows(train(lab, "own", *asked))
    assert [line["optim/steps"] for line in curve] == [2, 4]
    assert max(line["policy/bounded"] for line in curve) > 0


def test_a_users_loss_is_handed_what_it_asks_for(here) -> None:
    curve = rows(here("asks", "algorithm.loss={use: 'mylab.losses:length_mean'}", "steps=2"))
    assert all(0 < line["policy/row_tokens"] <= line["tokens/trained"] for line in curve)


def test_an_interrupted_answer_concludes_and_is_trained(here) -> None:
    short = ["sampling.max_new_tokens=4", "algorithm.interruption.text='#'", "algorithm.interruption.answer_tokens=3"]
    curve = rows(here("interrupted", *short, "algorithm.groups.without_spread=keep", "steps=2"))
    for line in curve:
        assert line["rollouts/interrupted"] > 0
        assert 4 < line["rollouts/length_max"] <= 4 + 1 + 3
        # The run's own `#` is neither generated nor trained.
        assert line["tokens/trained"] == line["tokens/generated"]


def test_an_interruption_must_fit_the_context_with_every_prompt(here) -> None:
    asked = ["model.context=34", "algorithm.interruption.text='##'", "algorithm.interruption.answer_tokens=5"]
    with pytest.raises(RunError, match=r"tasks.train with algorithm.interruption: a prompt may have 3 tokens"):
        here("too-long", *asked)


def test_an_entropy_bonus_keeps_the_entropy_up(here) -> None:
    """Without reward the bonus is all there is; both runs begin with the same rollouts."""
    nothing = ["rewards=[{use: 'mylab.rewards:brevity', weight: 0.0}]", "algorithm.groups.without_spread=keep"]
    shared = [*nothing, "engine.lr=0.003", "steps=6"]
    without, plus = (
        [line["policy/entropy"] for line in here(f"entropy-{coef}", *shared, f"algorithm.entropy.coef={coef}")]
        for coef in (0, 0.1)
    )
    assert plus[0] == without[0]
    assert without[-1] == pytest.approx(without[0], abs=0.02)
    assert plus[-1] > without[-1] + 0.01


def test_the_most_uncertain_tokens_alone_give_another_gradient(here) -> None:
    all_tokens, few = (rows(here(f"top-{x}", f"algorithm.entropy.top_frac={x}", "steps=1"))[0] for x in (1.0, 0.2))
    assert few["reward/mean"] == all_tokens["reward/mean"]
    assert few["tokens/trained"] == all_tokens["tokens/trained"]
    assert few["optim/grad_norm"] < 0.9 * all_tokens["optim/grad_norm"]


def test_the_mismatch_is_told_from_the_policys_own_change(here) -> None:
    """Decoupled, all minibatches are measured, and with what the policy was before the first of them."""
    shared = ["algorithm.minibatches=2", "algorithm.mismatch.mode=decoupled", "engine.lr=0.01", "steps=2"]
    for line in rows(here("decoupled", *shared)):
        assert line["mismatch/logp_diff_max"] < 1e-5
        assert line["policy/ratio_max"] > 1.01


def test_a_correction_multiplies_the_gradient(here) -> None:
    shared = ["algorithm.minibatches=2", "algorithm.mismatch.mode=decoupled", "engine.lr=1e-12", "steps=1"]
    halved = "algorithm.mismatch.weights=[{use: tis_token, cap: 0.5}]"
    plain, corrected = rows(here("uncorrected", *shared))[0], rows(here("corrected", *shared, halved))[0]
    assert corrected["optim/grad_norm"] == pytest.approx(0.5 * plain["optim/grad_norm"], rel=1e-4)
    assert (plain["mismatch/clipped_frac"], corrected["mismatch/clipped_frac"]) == (0, 1)


def adam_steps(lab, name: str, lr: float) -> list[float]:
    """The median change of a weight in each step after the first, in learning rates; Adam's first is 1."""
    steps = [weights(lab, name, step) for step in (1, 2, 3)]
    changes = [torch.cat([(b[name] - a[name]).abs().flatten() for name in a]) for a, b in pairwise(steps)]
    return [float(change[change > 0].median()) / lr for change in changes]


@pytest.mark.parametrize(
    ("name", "asked", "anew"),
    [
        ("kept", [], [False, False]),
        ("fresh", ["algorithm.fresh_optimizer=true"], [True, True]),
        ("cleared", ["algorithm.kl.reset.every=2", "algorithm.kl.reset.clear_optimizer=true"], [False, True]),
        ("not-cleared", ["algorithm.kl.reset.every=2"], [False, False]),
    ],
)
def test_the_optimizer_starts_anew_where_that_is_asked_for(lab, here, name: str, asked: list[str], anew) -> None:
    lr = 1e-3
    shared = [f"engine.lr={lr}", "algorithm.kl.coef=0.01", "steps=3", "save_every=1", "keep_checkpoints=3"]
    rows(here(f"adam-{name}", *shared, *asked))
    assert [0.99 < change < 1.01 for change in adam_steps(lab, f"adam-{name}", lr)] == anew


def test_what_a_loss_draws_follows_from_the_seed(here) -> None:
    random = ["algorithm.loss={use: clip_cov, frac: 0.3, cov_low: 0.01}", "steps=3"]
    first, again, other = (rows(here(f"draws-{i}", *random, f"seed={seed}")) for i, seed in enumerate((0, 0, 1)))
    assert first == again
    assert first != other
    assert all(line["policy/cov_clipped"] > 0.1 for line in first)
