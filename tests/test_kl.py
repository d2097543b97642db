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
    with pytest.raises(ValueError, match=r"k1.*\(got 'k4'\)"):
        kl("k4", torch.zeros(1), torch.zeros(1))


def test_kl_of_equal_policies_is_exactly_zero():
    logp = torch.tensor([-0.1, -7.3])
    assert all(kl(name, logp, logp).tolist() == [0.0, 0.0] for name in ("k1", "k2", "k3"))
