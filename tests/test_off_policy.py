"""Tokens that the policy did not write on the problem alone: their credit, loss, weight and denominator."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from groups import guided, rollout
from test_credit import WEIGHTS, Alone
from test_objective import run
from tiny import CPU

from rlpost.algorithm_recipe import Algorithm, Mismatch, OffPolicy
from rlpost.batch import documents_of, make_batch
from rlpost.behavior import with_behavior
from rlpost.credit import credit
from rlpost.document import Document
from rlpost.losses import importance, importance_sequence, shaped
from rlpost.mismatch import ratio_summary
from rlpost.objective import Objective
from rlpost.packing import Packer
from rlpost.types import Group, Task

POLICY, HELPED = (0.0, 1.0, 0.0), (1.0, 1.0, 0.0)


class One(Alone):
    def max(self, value):
        return value


def mixed_group():
    """Rewards 0 1 0 of the policy and 1 1 0 under a hint."""
    own, helped = [rollout(bool(r)) for r in POLICY], [guided(bool(r)) for r in HELPED]
    for one in (*own, *helped):
        one.reward_parts = {"right": one.reward, "style": 0.0}
    return Group(0, Task("a", ""), [*own, *helped])


def advantages_of(statistics, **advantage):
    algorithm = Algorithm(advantage=advantage, off_policy=OffPolicy(statistics=statistics))
    group = mixed_group()
    found = credit([group], documents_of([group]), algorithm, WEIGHTS, kl_coef=0.0, world=One())
    return [float(torch.as_tensor(one.advantage).flatten()[0]) for one in found]


@pytest.mark.parametrize(
    ("statistics", "wanted"),
    [
        ("pooled", [-1 / 2, 1 / 2, -1 / 2, 1 / 2, 1 / 2, -1 / 2]),
        ("role", [-1 / 3, 2 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3]),
        ("policy", [-1 / 3, 2 / 3, -1 / 3, 2 / 3, 2 / 3, -1 / 3]),
    ],
)
def test_whose_rewards_are_compared(statistics, wanted):
    assert advantages_of(statistics, use="dr_grpo") == pytest.approx(wanted)


def test_statistics_of_the_policy_scale_by_its_deviation():
    std = math.sqrt(1 / 3)  # of 0 1 0, unbiased
    assert advantages_of("policy", use="grpo", scale_by_std=True)[3] == pytest.approx(2 / 3 / std, rel=1e-5)


def documents():
    """An answer of the policy and one that was written under a hint; three tokens each."""
    own = Document((2, 3), (4, 5, 1), (-0.5, -1.0, -0.25), 1.0, group=0, version=3)
    helped = Document((2, 3), (6, 7, 1), (-0.75, -0.5, -0.5), -1.0, group=0, version=3, off_policy=True)
    return [own, replace(helped, sampled_prompt_ids=(9, 2, 3))]


def micro_of(parts=None):
    [micro] = make_batch(parts or documents(), Packer(16, 12, CPU), One()).micros
    return micro


def off_policy(**loss):
    return OffPolicy(loss=loss)


def test_packing_marks_off_policy_tokens():
    micro = micro_of()
    assert micro.has_off_policy and not micro_of(documents()[:1]).has_off_policy
    assert int((micro.off_policy_BT & micro.mask_BT).sum()) == 3


def test_t37_off_policy_tokens_have_a_loss_of_their_own():
    shift, gamma = 0.2, 0.5
    algorithm = Algorithm(loss={"use": "reinforce"}, off_policy=off_policy(use="shaped", gamma=gamma))
    loss, grad, _ = run(algorithm, micro_of(), shift=shift)
    rho = math.exp(shift)
    shaped_loss = 3 * rho / (rho + gamma)  # advantage -1
    own_loss = -(-0.5 - 1.0 - 0.25 + 3 * shift)
    assert loss == pytest.approx((own_loss + shaped_loss) / 6, rel=1e-6)
    assert sorted(grad.tolist()) == pytest.approx([-1 / 6] * 3 + [rho * gamma / (rho + gamma) ** 2 / 6] * 3)


def test_without_a_loss_of_their_own_they_have_that_of_the_others():
    same = run(Algorithm(loss={"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}), micro_of(), shift=0.1)
    plain = [replace(one, off_policy=False) for one in documents()]
    other = run(Algorithm(loss={"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}), micro_of(plain), shift=0.1)
    assert same[0] == pytest.approx(other[0])


def test_t37_the_mismatch_with_the_generator_is_that_of_the_policys_own_tokens():
    micro, objective = micro_of(), None
    algorithm = Algorithm(
        loss={"use": "reinforce"},
        off_policy=off_policy(use="importance"),
        mismatch=Mismatch(mode="decoupled", weights=[{"use": "tis_token", "cap": 1.05}]),
    )
    objective = Objective(algorithm, One())
    _, grad, _ = run(algorithm, micro, shift=0.1, objective=objective)
    figures = objective.mismatch_figures()
    assert figures["mismatch/logp_diff_max"] == pytest.approx(0.1, abs=1e-6)
    assert sum(part.shape[1] for part in objective.seen) == 3
    rho = math.exp(0.1)
    assert figures["guided/ratio_p50"] == pytest.approx(rho, rel=1e-5)
    assert figures["guided/ess_frac"] == pytest.approx(1.0)
    # The policy's own tokens are multiplied by the capped weight, the others have their ratio and nothing else.
    assert sorted(grad.tolist()) == pytest.approx([-1.05 / 6] * 3 + [rho / 6] * 3, rel=1e-5)


def test_gamma_is_a_quantile_of_the_step_whatever_its_split():
    algorithm = Algorithm(off_policy=off_policy(use="shaped", gamma=0.1, quantile=0.5))
    objective = Objective(algorithm, One())
    assert objective.needs_prox
    logs = torch.tensor([-3.0, -2.0, -0.25])
    parts = [
        replace(one, scores={"prox_logp": torch.tensor(one.behavior_logp) + (logs if one.off_policy else 0.0)})
        for one in documents()
    ]
    objective.begin(parts)
    assert objective.gamma == pytest.approx(math.exp(-2.0)) == objective.figures()["guided/gamma"]
    far = [replace(one, scores={"prox_logp": torch.full((3,), -50.0)}) for one in documents()]
    objective.begin(far)
    assert objective.gamma == 1e-4


@pytest.mark.parametrize("use", ["trainer", "plain"])
def test_t37_the_denominator_may_be_the_trainers_with_the_hint_or_without(use):
    class Engine:
        def token_logp(self, micro):
            self.prompts = micro.tokens_BT
            return torch.full(micro.tokens_BT.shape, -2.0), None

    algorithm = Algorithm(off_policy=OffPolicy(behavior=use))
    engine, nan = Engine(), math.nan
    own, helped = (replace(one, scores={"prox_logp": torch.full((3,), -3.0)}) for one in documents())
    helped = replace(helped, behavior_logp=(-0.75, nan, -0.5))
    expert = replace(helped, behavior_logp=(0.0,) * 3, sampled_prompt_ids=(2, 3))
    recipe = SimpleNamespace(algorithm=algorithm)
    context = SimpleNamespace(recipe=recipe, engine=engine, packer=Packer(16, 12, CPU), world=One())
    first, second, third = with_behavior(context, [own, helped, expert])
    assert first is own and third.behavior_logp == (0.0,) * 3
    wanted = -2.0 if use == "trainer" else -3.0
    assert second.behavior_logp[::2] == (wanted, wanted) and math.isnan(second.behavior_logp[1])
    if use == "trainer":
        assert engine.prompts[0, :5].tolist() == [9, 2, 3, 6, 7]  # under the prompt that the generator saw


def test_what_sampling_left_out_is_in_the_denominator_and_not_in_the_batch():
    own, helped = documents()
    sampled = [replace(own, inclusion=0.5), replace(helped, inclusion=0.0)]
    batch = make_batch(sampled, Packer(16, 12, CPU), One())
    [micro] = batch.micros
    assert batch.step_tokens == 3 == int(micro.mask_BT.sum())
    assert micro.weight_BT[micro.mask_BT].tolist() == pytest.approx([1 / 6 / 0.5] * 3)


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"])
def test_the_mean_over_samples_is_the_weight_without_sampling(mode):
    """Of 4 answers 2 are trained, each pair as likely: on average each weighs what it weighs without sampling."""
    whole = [Document((2,), (4,) * n, (-0.5,) * n, 1.0, group=n % 2) for n in (1, 2, 3, 4)]

    def weights(parts):
        found = [0.0] * 4
        for micro in make_batch(parts, Packer(32, 32, CPU), One(), mode, 8).micros:
            for i in range(4):
                held = micro.mask_BT & (micro.adv_BT == 1.0 + i)
                found[i] += float(micro.weight_BT[held].sum())
        return torch.tensor(found)

    whole = [replace(one, advantage=1.0 + i) for i, one in enumerate(whole)]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    samples = [
        weights([replace(one, inclusion=0.5 if i in pair else 0.0) for i, one in enumerate(whole)]) for pair in pairs
    ]
    torch.testing.assert_close(torch.stack(samples).mean(0), weights(whole))


def test_importance_and_shaped_match_hand_tables():
    logp = torch.log(torch.tensor([0.2, 0.4, 0.1], dtype=torch.float64)).requires_grad_()
    behavior = torch.log(torch.tensor([0.4, 0.2, 1.0], dtype=torch.float64))
    adv = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    loss, stats = importance(logp, behavior, adv)
    assert loss.tolist() == pytest.approx([-0.5, 2.0, -0.2]) and stats["ratio"].tolist() == pytest.approx(
        [0.5, 2.0, 0.1]
    )
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert grad.tolist() == pytest.approx([-0.5, 2.0, -0.2])
    loss, _ = shaped(logp, behavior, adv, gamma=0.5)
    assert loss.tolist() == pytest.approx([-0.5, 0.8, -2 / 6])
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert grad.tolist() == pytest.approx(
        [-0.25, 2 * 0.5 / 6.25, -2 * 0.1 * 0.5 / 0.36]
    )  # -A rho gamma / (rho + gamma)^2


def test_importance_of_a_sequence_is_the_product():
    logp, behavior = torch.log(torch.tensor([[0.5, 0.5, 0.9]])), torch.log(torch.tensor([[0.25, 0.25, 0.1]]))
    where = {"document_BT": torch.tensor([[0, 0, 1]]), "mask_BT": torch.tensor([[True, True, False]])}
    loss, stats = importance_sequence(logp, behavior, torch.tensor([[1.0, 1.0, 1.0]]), **where)
    assert loss[0, :2].tolist() == pytest.approx([-4.0, -4.0]) and stats["ratio"][0, 0] == pytest.approx(4.0)


def toy(num_tokens=5, seed=0):
    """Logits of a policy over one-token answers, what it writes under a hint, and rewards."""
    dice = torch.Generator().manual_seed(seed)
    logits, hinted = torch.randn(2, num_tokens, generator=dice, dtype=torch.float64)
    return logits, torch.softmax(hinted, 0), torch.rand(num_tokens, generator=dice, dtype=torch.float64)


def exact_gradient(logits, rewards, baseline):
    logits = logits.clone().requires_grad_()
    expected = (torch.softmax(logits, 0) * (rewards - baseline)).sum()
    return torch.autograd.grad(-expected, logits)[0]


def guided_gradient(loss_of, logits, writer, adv_N, tokens_N):
    logits = logits.clone().requires_grad_()
    logp_N = torch.log_softmax(logits, 0)[tokens_N]
    loss, _ = loss_of(logp_N, writer.log()[tokens_N], adv_N)
    return torch.autograd.grad(loss.mean(), logits)[0]


def test_the_guided_gradient_is_unbiased_without_shaping_and_biased_with_it():
    """E over what the hinted policy writes of the ratio's gradient is the plain policy's exact one, by enumeration.

    The baseline is a constant here: of the samples' own rewards it would cost a factor (n - 1) / n, as in any group.
    """
    logits, writer, rewards = toy()
    exact = exact_gradient(logits, rewards, baseline=0.4)
    tokens = torch.arange(len(logits))

    def expected(loss_of):
        each = [guided_gradient(loss_of, logits, writer, rewards[[i]] - 0.4, tokens[[i]]) for i in range(len(logits))]
        return sum(p * grad for p, grad in zip(writer, each, strict=True))

    torch.testing.assert_close(expected(importance), exact, rtol=1e-12, atol=1e-14)
    biased = expected(lambda *given: shaped(*given, gamma=0.1))
    assert float((biased - exact).norm() / exact.norm()) > 0.3


def test_the_guided_gradient_by_monte_carlo_is_within_its_error():
    logits, writer, rewards = toy(seed=1)
    exact = exact_gradient(logits, rewards, baseline=0.4)
    dice = torch.Generator().manual_seed(2)
    num = 20_000
    tokens = torch.multinomial(writer, num, replacement=True, generator=dice)
    p = torch.softmax(logits, 0)
    rho = (p / writer)[tokens]
    each = -(rho * (rewards[tokens] - 0.4))[:, None] * (torch.eye(len(logits), dtype=torch.float64)[tokens] - p)
    error = each.std(0) / math.sqrt(num)
    assert bool(((each.mean(0) - exact).abs() < 4 * error).all())
    torch.testing.assert_close(guided_gradient(importance, logits, writer, rewards[tokens] - 0.4, tokens), each.mean(0))


def test_ratio_summary_has_quantiles_and_effective_sample_size():
    log_rho = torch.log(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    found = ratio_summary(log_rho)
    assert found["ess_frac"] == pytest.approx(36 / (4 * 12))
    assert (found["ratio_p50"], found["ratio_p99"]) == pytest.approx((1.0, 3.0))
    assert ratio_summary(torch.zeros(0)) == {}
