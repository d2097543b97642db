<<<<<<< HEAD
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
=======
import pytest
import torch

from rlpost.kl import kl

P_LOGITS = torch.tensor([0.5, -1.0, 0.2, 1.3], dtype=torch.float64)
REF_LOGP = torch.log_softmax(torch.tensor([-0.3, 0.4, 0.9, 0.1], dtype=torch.float64), 0)


def expected_gradient(estimator):
    """E over a ~ policy of the gradient of the estimator as a loss, exactly: weights p(a) are not differentiated."""
    logits = P_LOGITS.clone().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    (logp.detach().exp() * kl(estimator, logp, REF_LOGP)).sum().backward()
    return logits.grad


def reverse_kl_gradient():
    logits = P_LOGITS.clone().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    (logp.exp() * (logp - REF_LOGP)).sum().backward()
    return logits.grad


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [0.0, 0.5, -2.0]), ("k2", [0.0, 0.125, 2.0]), ("k3", [0.0, 0.1065306597, 4.3890560989])],
)
def test_kl_matches_hand_table(estimator, expected):
    logp = torch.tensor([-1.0, -0.5, -3.0], dtype=torch.float64)
    ref = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(kl(estimator, logp, ref), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    logp = torch.log_softmax(P_LOGITS, 0)
    exact = (logp.exp() * (logp - REF_LOGP)).sum()
    torch.testing.assert_close((logp.exp() * kl(estimator, logp, REF_LOGP)).sum(), exact)


def test_t11_k1_as_a_loss_has_expected_gradient_zero():
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64))


def test_t11_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    torch.testing.assert_close(expected_gradient("k2"), reverse_kl_gradient())
    assert reverse_kl_gradient().norm() > 0.1


def test_t11_k3_as_a_loss_has_another_gradient_than_the_reverse_kl():
    # It is that of the forward KL(reference || policy): p - ref.
    torch.testing.assert_close(expected_gradient("k3"), torch.softmax(P_LOGITS, 0) - REF_LOGP.exp())
    assert (expected_gradient("k3") - reverse_kl_gradient()).norm() > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradient_matches_finite_differences(estimator):
    logp = torch.tensor([-1.0, -0.1, -4.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0, -0.3, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logp: kl(estimator, logp, ref), logp)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gap", [1e10, -1e10, 200.0, -200.0])
def test_kl_of_extreme_log_ratios_is_finite(estimator, gap):
    logp = torch.tensor([gap], requires_grad=True)
    value = kl(estimator, logp, torch.zeros(1))
    value.sum().backward()
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(logp.grad).all())


def test_kl_refuses_an_unknown_estimator():
    with pytest.raises(ValueError, match=r"k1, k2 or k3 \(got 'k4'\)"):
        kl("k4", torch.zeros(1), torch.zeros(1))


def test_kl_of_equal_policies_is_exactly_zero():
    logp = torch.tensor([-0.1, -7.3])
    assert all(kl(name, logp, logp).tolist() == [0.0, 0.0] for name in ("k1", "k2", "k3"))
>>>>>>> main
