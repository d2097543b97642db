"""KL estimators and the adaptive coefficient; what is unbiased stands in test_estimators.py. Tn names a known trap."""

from functools import partial
from math import exp, log

import pytest
import torch

from rlpost.kl import adapted_coef, corrected_k3, kl
from rlpost.losses import ppo_clip, weighted_sum
from rlpost.masked import blank

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
ESTIMATORS = ["k1", "k2", "k3", "k1_plus", "k3_plus"]


def t(*values):
    return torch.tensor([values], dtype=torch.float64)


def test_values_match_hand_table():
    # d = ln 2: k1 .6931, k2 .2402, k3 .5 - 1 + .6931 = .1931.  d = -ln 2: k3 2 - 1 - .6931 = .3069.
    d = t(log(2), -log(2))
    half_square = 0.5 * log(2) ** 2
    close(kl("k1", d, 0 * d), d)
    close(kl("k2", d, 0 * d), t(half_square, half_square))
    close(kl("k3", d, 0 * d), t(log(2) - 0.5, 1 - log(2)))


@pytest.mark.parametrize(("plus", "value"), [("k1_plus", "k1"), ("k3_plus", "k3")])
def test_t11_straight_through_has_one_value_and_the_gradient_of_k2(plus, value):
    d = t(0.7, -1.3).requires_grad_()
    found = kl(plus, d, torch.zeros_like(d))
    close(found, kl(value, d, torch.zeros_like(d)))
    found.sum().backward()
    close(d.grad, d.detach())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_matches_finite_differences(estimator):
    logp, ref = t(-0.3, -2.0, -1.0).requires_grad_(), t(-0.5, -1.0, -1.2)
    assert torch.autograd.gradcheck(lambda x: kl(estimator, x, ref), logp)


def test_corrected_k3_gradient_matches_finite_differences():
    logp, mu, ref = t(-0.3, -2.0).requires_grad_(), t(-0.4, -1.8), t(-0.5, -1.0)
    assert torch.autograd.gradcheck(lambda x: corrected_k3(x, mu, ref), logp)


def test_t12_corrected_k3_has_no_term_of_other_tokens():
    # d(rho k3) / dlogp = rho (k3 + 1 - e^-d) = rho d, of the token itself; a sequence ratio would add the others' k3.
    logp, mu, ref = t(-0.3, -2.0).requires_grad_(), t(-0.4, -1.8), t(-0.5, -1.0)
    corrected_k3(logp, mu, ref).sum().backward()
    close(logp.grad, t(exp(0.1) * 0.2, exp(-0.2) * -1.0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite_in_float32(estimator, gap):
    logp = torch.tensor([-1.0], requires_grad=True)
    found = kl(estimator, logp, logp.detach() - gap)
    found.sum().backward()
    assert found.isfinite().all() and logp.grad.isfinite().all()
    assert corrected_k3(logp, logp.detach() - gap, logp.detach() + gap).isfinite().all()


def kl_gradient(estimator, coef, planted=0.0):
    mask = torch.tensor([[True, True, False]])
    logp = torch.where(mask, t(-1, -2, -3), planted).requires_grad_()
    ref = torch.where(mask, t(-1.5, -1.0, -2.0), planted)
    kept, kept_ref = blank(mask, logp, ref)
    loss, _ = ppo_clip(kept, kept.detach(), torch.zeros_like(kept), clip_low=0.2, clip_high=0.2)
    weighted_sum(loss + coef * kl(estimator, kept, kept_ref), mask / 2, dp_size=1).backward()
    return logp.grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_t13_kl_term_is_used_once_and_never_under_the_mask(estimator):
    once = kl_gradient(estimator, 0.1)
    assert once[0, :2].ne(0).all() and once[0, 2] == 0
    close(kl_gradient(estimator, 0.2), 2 * once)


@pytest.mark.parametrize("planted", [float("nan"), float("inf"), float("-inf")])
def test_t20_what_lies_under_the_mask_changes_nothing(planted):
    assert torch.equal(kl_gradient("k3", 0.1, planted), kl_gradient("k3", 0.1))


@pytest.mark.parametrize(("kl_mean", "expected"), [(9.0, 1.1), (0.0, 0.9), (1.1, 1.05), (1.0, 1.0)])
def test_adapted_coef_steers_towards_the_target_by_at_most_a_fifth_per_horizon(kl_mean, expected):
    # error clip(kl - 1, -.2, .2), times 50 / 100.
    assert adapted_coef(1.0, kl_mean, target=1.0, horizon=100, num_samples=50) == pytest.approx(expected)


def test_an_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match=r"estimator must be k1, k2, .* \(got 'k4'\)"):
        kl("k4", t(0), t(0))
