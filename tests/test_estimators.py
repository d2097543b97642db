"""Which estimators are unbiased, on a toy whose gradients are known exactly.

The policy is a softmax over V = 4 answers of one token, with a known reward for each. The exact gradient of E[r] with
respect to the logits is p (r - E r). Expectations over groups of G answers are taken by enumerating all V^G of them, so
"unbiased" holds to rounding and "biased" by a margin; a Monte-Carlo mean of the same estimators is then compared with
the exact gradient in units of its own standard error.
"""

from functools import partial
from itertools import product

import pytest
import torch

from rlpost import advantages, losses, mismatch
from rlpost.kl import corrected_k3, kl

LOGITS = torch.tensor([0.5, -0.3, 0.9, 0.1], dtype=torch.float64)
BEHAVIOR_LOGITS = torch.tensor([0.1, 0.2, 0.6, -0.4], dtype=torch.float64)
REF_LOGITS = torch.tensor([-0.6, 0.4, 0.2, 0.8], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
LENGTHS = torch.tensor([4, 1, 9, 2])
P, MU, REF = (torch.softmax(x, 0) for x in (LOGITS, BEHAVIOR_LOGITS, REF_LOGITS))
G = 3
MARGIN = 0.005
"""Bias that an enumeration, exact to 1e-12, must show to be called one."""
SCORES = torch.eye(4, dtype=torch.float64) - P  # d log p(answer) / d logits, one row an answer
EXACT = P * (REWARDS - P @ REWARDS)

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def bias(found, exact):
    """Distance to the exact gradient as a share of its length, after the best positive factor is taken out."""
    factor = float(found @ exact / (exact @ exact))
    return float((found / factor - exact).norm() / exact.norm()) if factor > 0 else float("inf")


def group_gradient(advantage, group):
    """(1 / G) sum_i A_i dlog p(y_i) of one group of answers."""
    return advantage(group) @ SCORES[group] / len(group)


def expected(advantage):
    """The expectation of `group_gradient` over every group that could be drawn."""
    groups = [torch.tensor(answers) for answers in product(range(4), repeat=G)]
    return sum(P[group].prod() * group_gradient(advantage, group) for group in groups)


ADVANTAGES = {
    "none": lambda group: REWARDS[group],
    "remax": lambda group: advantages.remax(REWARDS[group], float(REWARDS[LOGITS.argmax()])),
    "rloo": lambda group: advantages.rloo(REWARDS[group]),
    "dr_grpo": lambda group: advantages.dr_grpo(REWARDS[group]),
    "opo": lambda group: advantages.opo(REWARDS[group], LENGTHS[group]),
    "grpo": lambda group: advantages.grpo(REWARDS[group], scale_by_std=True),
    "whitened": lambda group: advantages.reinforce_pp(
        [REWARDS[group]], advantages.moments([REWARDS[group]], [torch.ones(G)])
    )[0],
    "passk": lambda group: advantages.passk(REWARDS[group], scale_by_std=False),
}


@pytest.mark.parametrize("name", ["none", "remax", "rloo"])
def test_advantage_with_a_baseline_of_others_is_unbiased(name):
    close(expected(ADVANTAGES[name]), EXACT)


def test_mean_baseline_shrinks_the_gradient_by_one_over_g_and_keeps_its_direction():
    # The baseline holds each rollout's own reward with weight 1 / G.
    close(expected(ADVANTAGES["dr_grpo"]), EXACT * (G - 1) / G)


@pytest.mark.parametrize("name", ["grpo", "whitened", "opo", "passk"])
def test_advantage_that_divides_by_its_own_sample_or_weighs_by_it_is_biased(name):
    assert bias(expected(ADVANTAGES[name]), EXACT) > MARGIN


def test_passk_is_the_unbiased_gradient_of_the_expected_best():
    logits = LOGITS.clone().requires_grad_()
    p = torch.softmax(logits, 0)
    best = sum(p[list(a)].prod() * REWARDS[list(a)].max() for a in product(range(4), repeat=G))
    (exact,) = torch.autograd.grad(best, logits)
    close(expected(ADVANTAGES["passk"]) * G, exact)  # sum over the group, not mean


@pytest.mark.parametrize(("name", "unbiased"), [("none", True), ("rloo", True), ("grpo", False)])
def test_monte_carlo_mean_agrees_within_its_standard_error(name, unbiased):
    # 20,000 groups: the gradient's components are then known to a standard error of 0.001 to 0.005.
    num_groups = 20_000
    groups = torch.multinomial(P, num_groups * G, replacement=True, generator=torch.Generator().manual_seed(11))
    table = {a: group_gradient(ADVANTAGES[name], torch.tensor(a)) for a in product(range(4), repeat=G)}
    draws = torch.stack([table[tuple(answers)] for answers in groups.view(-1, G).tolist()])
    error = draws.std(0) / num_groups**0.5
    distance = ((draws.mean(0) - EXACT) / error).abs().max()
    assert error.max() < 0.006
    assert distance < 4 if unbiased else distance > 20


# Policy losses. The advantage is the answer's own reward, so that only the ratio is on trial.


def loss_gradient(loss_fn, source, weight=None):
    """-E over answers drawn from `source` of the gradient of a loss, with all four answers in one micro-batch."""
    logits = LOGITS.clone().requires_grad_()
    logp, behavior = torch.log_softmax(logits, 0)[None], source.log()[None]
    loss, _ = loss_fn(logp, behavior, REWARDS[None])
    if weight is not None:
        loss = loss * weight(logp, behavior)
    return -torch.autograd.grad((source * loss).sum(), logits)[0]


ALONE = {"document_BT": torch.arange(4)[None], "mask_BT": torch.ones(1, 4, dtype=torch.bool)}
WIDE = {"clip_low": 1.0, "clip_high": 100.0}
TIGHT = {"clip_low": 0.1, "clip_high": 0.1}
OFF_POLICY = {
    "ppo_clip, no clip active": (partial(losses.ppo_clip, **WIDE), True),
    "ppo_clip, clip active": (partial(losses.ppo_clip, **TIGHT), False),
    "two_sided, no clip active": (partial(losses.two_sided, **WIDE, ratio_cap=100.0), True),
    "cispo, cap not reached": (partial(losses.cispo, ratio_cap=100.0), True),
    "cispo, cap reached": (partial(losses.cispo, ratio_cap=1.1), False),
    "gspo, one token, no clip active": (partial(losses.gspo, **ALONE, **WIDE), True),
    "gmpo, one token, no clip active": (partial(losses.gmpo, **ALONE, clip_low=20, clip_high=20), True),
    "dppo_tv, inside its region": (partial(losses.dppo_tv, tv_low=1, tv_high=1, ratio_cap=100.0), True),
    "dppo_tv, outside its region": (partial(losses.dppo_tv, tv_low=0.02, tv_high=0.02, ratio_cap=100.0), False),
    "reinforce": (losses.reinforce, False),
    "sapo": (partial(losses.sapo, tau_pos=1.0, tau_neg=1.05), False),
    "vespo": (partial(losses.vespo, **ALONE, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0), False),
    "kimi_mirror": (partial(losses.kimi_mirror, **ALONE, tau=0.5), False),
}


@pytest.mark.parametrize("case", OFF_POLICY)
def test_policy_loss_off_policy(case):
    loss_fn, unbiased = OFF_POLICY[case]
    found = loss_gradient(loss_fn, MU)
    if unbiased:
        close(found, EXACT)
    else:
        assert bias(found, EXACT) > MARGIN


@pytest.mark.parametrize("case", OFF_POLICY)
def test_every_policy_loss_is_unbiased_on_policy(case):
    close(loss_gradient(OFF_POLICY[case][0], P), EXACT)


def two_token_gradient(loss_fn):
    """-E under mu of the gradient for answers of two independent tokens whose reward is the product of their parts."""
    logits = LOGITS.clone().requires_grad_()
    pairs = torch.tensor(list(product(range(4), repeat=2)))
    document = torch.arange(16)[:, None].expand(16, 2)
    behavior = MU.log()[pairs]
    reward = REWARDS[pairs].prod(1, keepdim=True).expand(16, 2)
    loss, _ = loss_fn(
        torch.log_softmax(logits, 0)[pairs], behavior, reward, document_BT=document, mask_BT=document >= 0
    )
    found = -torch.autograd.grad((behavior.sum(1).exp()[:, None] * loss).sum(), logits)[0]
    return found, 2 * (P @ REWARDS) * EXACT  # E[r r'] = (E r)^2


@pytest.mark.parametrize("loss_fn", [partial(losses.gspo, **WIDE), partial(losses.gmpo, clip_low=20, clip_high=20)])
def test_length_normalised_ratio_is_biased_off_policy(loss_fn):
    assert bias(*two_token_gradient(loss_fn)) > MARGIN


WEIGHTS = {
    "tis_token, cap not reached": (partial(mismatch.tis_token, mask_BT=ALONE["mask_BT"], cap=100.0), True),
    "tis_token, cap reached": (partial(mismatch.tis_token, mask_BT=ALONE["mask_BT"], cap=1.1), False),
    "tis_sequence, cap not reached": (partial(mismatch.tis_sequence, **ALONE, cap=100.0), True),
    "mis_token": (partial(mismatch.mis_token, mask_BT=ALONE["mask_BT"], cap=1.3), False),
    "mis_sequence": (partial(mismatch.mis_sequence, **ALONE, cap=1.3), False),
    "icepop": (partial(mismatch.icepop, mask_BT=ALONE["mask_BT"], low=0.8, high=1.3), False),
    "geometric_rejection": (partial(mismatch.geometric_rejection, **ALONE, low=0.8, high=1.3), False),
    "k3_rejection": (partial(mismatch.k3_rejection, **ALONE, limit=0.02), False),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_mismatch_weight_makes_reinforce_unbiased_only_where_nothing_is_cut(case):
    weigh, unbiased = WEIGHTS[case]
    found = loss_gradient(losses.reinforce, MU, weight=weigh)
    if unbiased:
        close(found, EXACT)
    else:
        assert bias(found, EXACT) > MARGIN


# KL(policy || reference), and its gradient.

KL = P @ (P.log() - REF.log())
REVERSE = P * (P.log() - REF.log() - KL)
FORWARD = P - REF  # gradient of KL(reference || policy)


def kl_expectation(estimator, source=P):
    """Value and gradient of an estimator averaged over tokens from `source`, whose own weights carry no gradient."""
    logits = LOGITS.clone().requires_grad_()
    logp, ref = torch.log_softmax(logits, 0), REF.log()
    per_token = corrected_k3(logp, source.log(), ref) if estimator == "corrected_k3" else kl(estimator, logp, ref)
    mean = source @ per_token
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


@pytest.mark.parametrize(
    ("estimator", "unbiased"),
    [("k1", True), ("k3", True), ("k1_plus", True), ("k3_plus", True), ("corrected_k3", True), ("k2", False)],
)
def test_value_of_kl_estimators(estimator, unbiased):
    value, _ = kl_expectation(estimator)
    assert bool((value - KL).abs() < 1e-12) is unbiased
    assert unbiased or (value - KL).abs() > 0.01


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [("k1", 0 * P), ("k3", FORWARD), *((name, REVERSE) for name in ("k2", "k1_plus", "k3_plus", "corrected_k3"))],
)
def test_t11_gradient_of_kl_estimators_on_policy(estimator, exact):
    # k1: E[dlog p] = 0.  k2: E[d dlog p].  k3: E[(1 - ref / p) dlog p] = -sum ref dlog p, the forward KL's.
    close(kl_expectation(estimator)[1], exact)
    assert bias(FORWARD, REVERSE) > MARGIN


def test_t11_off_policy_only_the_corrected_estimator_is_unbiased():
    value, gradient = kl_expectation("corrected_k3", MU)
    close(value, KL)
    close(gradient, REVERSE)
    for estimator in ("k1", "k2", "k3", "k1_plus", "k3_plus"):
        assert bias(kl_expectation(estimator, MU)[1], REVERSE) > MARGIN


def test_k1_in_the_reward_gives_the_gradient_of_the_reverse_kl():
    d = P.log() - REF.log()
    close((P * d) @ SCORES, REVERSE)


def test_monte_carlo_value_of_k3_has_a_smaller_error_than_k1():
    draws = torch.multinomial(P, 50_000, replacement=True, generator=torch.Generator().manual_seed(2))
    for estimator in ("k1", "k3"):
        sample = kl(estimator, P.log(), REF.log())[draws]
        error = sample.std() / len(draws) ** 0.5
        assert (sample.mean() - KL).abs() < 4 * error < 0.02
    assert kl("k3", P.log(), REF.log())[draws].std() < kl("k1", P.log(), REF.log())[draws].std()
