"""Hand tables, gradients, masks and extremes of the policy losses. Tn names a known trap of this kind of code."""

from functools import partial
from math import e, exp, log

import pytest
import torch

from rlpost import losses
from rlpost.aggregation import count, token_weights
from rlpost.masked import blank

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


def t(*values):
    return torch.tensor([values], dtype=torch.float64)


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
TOKEN = {
    "ppo_clip": partial(losses.ppo_clip, **CLIP),
    "ppo_dual_clip": partial(losses.ppo_dual_clip, **CLIP, dual_clip=3.0),
    "two_sided": partial(losses.two_sided, **CLIP, ratio_cap=4.0),
    "cispo": partial(losses.cispo, ratio_cap=5.0),
    "sapo": partial(losses.sapo, tau_pos=1.0, tau_neg=1.05),
    "dppo_tv": partial(losses.dppo_tv, tv_low=0.2, tv_high=0.2, ratio_cap=20.0),
    "reinforce": losses.reinforce,
}
SEQUENCE = {
    "gspo": partial(losses.gspo, **CLIP),
    "gspo_token": partial(losses.gspo_token, **CLIP),
    "gmpo": partial(losses.gmpo, clip_low=0.4, clip_high=0.4),
    "vespo": partial(losses.vespo, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0),
    "kimi_mirror": partial(losses.kimi_mirror, tau=0.5),
}
MASKED = {
    "clip_cov": partial(losses.clip_cov, **CLIP, frac=0.3, cov_low=0.5, cov_high=5.0),
    "kl_cov": partial(losses.kl_cov, frac=0.3, coef=0.7),
}
ALL = [*TOKEN, *SEQUENCE, *MASKED]
STOP_GRADIENT = ("cispo", "dppo_tv", "vespo", "reinforce")  # linear in logp, with a weight that is held


def run(name, *data):
    """Any loss on a masked micro-batch, as a training step would call it."""
    logp, behavior, adv, mask, document = data
    if name in TOKEN:
        return TOKEN[name](*blank(mask, logp, behavior, adv))
    if name in SEQUENCE:
        return SEQUENCE[name](logp, behavior, adv, document_BT=document, mask_BT=mask)
    draw = {"draw_BT": torch.linspace(0, 1, mask.numel()).view_as(mask)} if name == "clip_cov" else {}
    return MASKED[name](logp, behavior, adv, mask_BT=mask, **draw)


def batch(dtype=torch.float64, spread=0.5):
    """Two rows: documents 0 (3 trained), 1 (2 trained, 1 masked) and 2 (3 trained); one position is outside."""
    generator = torch.Generator().manual_seed(3)
    document = torch.tensor([[0, 0, 0, 1, 1], [1, 2, 2, 2, -1]])
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]]).bool()
    logp = -torch.rand(2, 5, generator=generator, dtype=torch.float64) - 0.1
    behavior = logp + spread * (torch.rand(2, 5, generator=generator, dtype=torch.float64) - 0.5)
    adv = torch.tensor([1.5, -1.0, 0.7], dtype=torch.float64)[document]
    return logp.to(dtype), behavior.to(dtype), adv.to(dtype), mask, document


def gradient(name, weight, *data):
    """The weighted sum of a loss, its gradient with respect to logp, and its stats."""
    logp = data[0].clone().requires_grad_()
    loss, stats = run(name, logp, *data[1:])
    total = losses.weighted_sum(loss, weight, dp_size=1)
    total.backward()
    return total.detach(), logp.grad, stats


def test_ppo_clip_matches_hand_table():
    rho, adv = t(1.5, 1.5, 0.5, 0.5, 1.0), t(1, -1, 1, -1, 2)
    loss, stats = losses.ppo_clip(rho.log(), 0 * rho, adv, clip_low=0.2, clip_high=0.2)
    close(loss, t(-1.2, 1.5, -0.5, 0.8, -2.0))  # clipped only where that is pessimistic
    assert stats["clipped"].tolist() == [[1, 0, 0, 1, 0]]


def test_clip_higher_moves_only_the_upper_bound():
    rho = t(1.25, 0.75)
    loss, _ = losses.ppo_clip(rho.log(), 0 * rho, t(1, -1), clip_low=0.2, clip_high=0.28)
    close(loss, t(-1.25, 0.8))


def test_t21_dual_clip_bounds_the_loss_of_bad_tokens_with_a_large_ratio():
    # -min(.5, .8) = -.5;  A = -1 at rho 1: 1;  A = -4 at rho 10: max(-40, 3 * -4) = -12, so the loss is 12.
    rho, adv = t(0.5, 1.0, 10.0), t(1, -1, -4)
    loss, stats = losses.ppo_dual_clip(rho.log(), 0 * rho, adv, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    close(loss, t(-0.5, 1.0, 12.0))
    assert stats["clipped"].tolist() == [[0, 0, 1]]


def test_two_sided_is_the_dual_clip_where_its_cap_lies_above_the_clip():
    rho, adv = t(0.5, 1.0, 10.0, 3.9, 10.0), t(1, -1, -4, -1, 2)
    ours, _ = losses.two_sided(rho.log(), 0 * rho, adv, **CLIP, ratio_cap=4.0)
    dual, _ = losses.ppo_dual_clip(rho.log(), 0 * rho, adv, **CLIP, dual_clip=4.0)
    close(ours, dual)
    close(ours, t(-0.5, 1.0, 16.0, 3.9, -2.56))


def test_two_sided_cap_below_the_clip_caps_good_tokens_too():
    loss, _ = losses.two_sided(t(10.0).log(), t(0), t(1), clip_low=0.2, clip_high=0.2, ratio_cap=1.1)
    close(loss, t(-1.1))


def test_gspo_matches_hand_table():
    # log rho = (ln 4, 0): s = exp(ln 4 / 2) = 2. With A = 1 the clip binds at 1.2; with A = -1 it does not.
    document, mask = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    where = {"document_BT": document, "mask_BT": mask, "clip_low": 0.2, "clip_high": 0.2}
    for loss_fn in (losses.gspo, losses.gspo_token):
        loss, stats = loss_fn(t(4, 1, 4, 1).log(), t(0, 0, 0, 0), t(1, 1, -1, -1), **where)
        close(loss, t(-1.2, -1.2, 2.0, 2.0))
        close(stats["ratio"], t(2, 2, 2, 2))


def test_gspo_token_has_the_gradient_of_gspo_where_a_sequence_has_one_advantage():
    logp, behavior, adv, mask, document = batch(spread=0.2)
    length = torch.tensor([3.0, 2.0, 3.0])[document]
    weight = torch.where(mask, 1 / (3 * length), 0.0)
    (value, grad, _), (value_token, grad_token, _) = (
        gradient(name, weight, logp, behavior, adv, mask, document) for name in ("gspo", "gspo_token")
    )
    close(value, value_token)
    close(grad, grad_token)


def test_gmpo_clips_by_sign_and_takes_the_geometric_mean():
    # A > 0: c = (min(.6, .4), -.2), mean .1.  A < 0: c = (.6, -.2), mean .2.
    document, mask = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    log_rho = t(0.6, -0.2, 0.6, -0.2)
    loss, stats = SEQUENCE["gmpo"](log_rho, 0 * log_rho, t(1, 1, -1, -1), document_BT=document, mask_BT=mask)
    close(loss, t(-exp(0.1), -exp(0.1), exp(0.2), exp(0.2)))
    assert stats["clipped"].tolist() == [[1, 0, 0, 0]]


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    logp, rho = t(-0.5, -2.0).requires_grad_(), t(2.0, 10.0)
    loss, stats = losses.cispo(logp, logp.detach() - rho.log(), t(1, -1), ratio_cap=5.0)
    close(loss, t(1.0, -10.0))  # -2 * 1 * -.5;  -5 * -1 * -2
    loss.sum().backward()
    close(logp.grad, t(-2.0, 5.0))
    assert stats["clipped"].tolist() == [[0, 1]]


def test_sapo_matches_hand_table_and_has_slope_one_at_ratio_one():
    # (4 / tau) sigmoid(0) = 2 / tau; 4 sigmoid(1) = 2.9242343. Slope at 1: (4 / tau) tau / 4 = 1.
    logp = t(0.0, 0.0, log(2)).requires_grad_()
    loss, _ = TOKEN["sapo"](logp, t(0, 0, 0), t(1, -1, 1))
    close(loss, t(-2.0, 2 / 1.05, -2.92423431))
    loss[0, :2].sum().backward()
    close(logp.grad[0, :2], t(-1, 1)[0])


def test_vespo_weighs_by_the_kernel_of_the_whole_ratio():
    # w = 4 * .5 = 2. A > 0: e^3 2^2 e^-6 = 4 e^-3.  A < 0: e^2 2^3 e^-4 = 8 e^-2.
    document, mask = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    logp = t(-1, -2, -1, -2)
    behavior = logp - t(4, 0.5, 4, 0.5).log()
    loss, stats = SEQUENCE["vespo"](logp, behavior, t(1, 1, -1, -1), document_BT=document, mask_BT=mask)
    close(stats["weight"], t(4 * e**-3, 4 * e**-3, 8 * e**-2, 8 * e**-2))
    close(loss, -stats["weight"] * t(1, 1, -1, -1) * logp)


def test_vespo_bounds_the_weight_of_a_sequence_from_below():
    # log w = -30, held at log 1e-8: e^3 (1e-8)^2.
    document, mask = torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool)
    _, stats = SEQUENCE["vespo"](t(-16, -16), t(-1, -1), t(1, 1), document_BT=document, mask_BT=mask)
    torch.testing.assert_close(stats["weight"], t(e**3 * 1e-16, e**3 * 1e-16), rtol=1e-6, atol=0)


def test_dppo_tv_stops_tokens_that_left_the_trust_region_on_their_own_side():
    # pi = .5, mu = .2: moved by .3 > .2, so a good token stops; a bad one goes on with min(2.5, 2) = 2.
    logp, behavior = t(0.5, 0.5, 0.05).log(), t(0.2, 0.2, 0.3).log()
    loss, stats = losses.dppo_tv(logp, behavior, t(1, -1, -1), tv_low=0.2, tv_high=0.2, ratio_cap=2.0)
    close(loss, t(0.0, 2 * log(0.5), 0.0))
    assert stats["clipped"].tolist() == [[1, 0, 1]]


def test_clip_cov_drops_the_lowest_draws_among_tokens_of_large_covariance():
    # means 0 and -2: cov = (3, 3, 0); two eligible, one dropped: the one with draw .1.
    logp, mask = t(-1, -3, -2), torch.ones(1, 3, dtype=torch.bool)
    loss, stats = losses.clip_cov(
        logp, logp, t(3, -3, 0), mask_BT=mask, draw_BT=t(0.5, 0.1, 0.0), **CLIP, frac=2e-4, cov_low=1.0, cov_high=5.0
    )
    close(loss, t(-3, 0, 0))
    assert stats["cov_clipped"].tolist() == [[0, 1, 0]]


def test_clip_cov_without_eligible_tokens_is_ppo_clip():
    logp, behavior, adv, mask, _ = batch()
    draw = torch.rand(2, 5)
    ours, _ = losses.clip_cov(
        logp, behavior, adv, mask_BT=mask, draw_BT=draw, **CLIP, frac=1.0, cov_low=50.0, cov_high=60.0
    )
    close(ours[mask], losses.ppo_clip(logp, behavior, adv, **CLIP)[0][mask])


def test_kl_cov_penalises_the_tokens_of_largest_covariance():
    # cov = (3, 3, 0) for adv (3, -3, 0), here (4.5, 0, ...) with adv (4.5, 0, 0): only the first is penalised.
    logp, mask = t(-1, -3, -2), torch.ones(1, 3, dtype=torch.bool)
    loss, stats = losses.kl_cov(logp, logp - t(2, 1, 1).log(), t(4.5, 0, 0), mask_BT=mask, frac=2e-4, coef=0.5)
    close(loss, t(-2 * 4.5 + 0.5 * log(2), 0, 0))
    assert stats["cov_penalised"].tolist() == [[1, 0, 0]]


def test_kimi_mirror_sums_to_the_square_of_the_sequence():
    # log ratio of the sequence .4: (tau / 2) .4^2 = .16 with tau 2, .08 on each of two tokens.
    document, mask = torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool)
    logp = t(-1, -2)
    loss, _ = losses.kimi_mirror(logp, logp - t(0.1, 0.3), t(1, 1), document_BT=document, mask_BT=mask, tau=2.0)
    close(loss, t(1.08, 2.08))


def test_positive_nll_trains_the_correct_samples_only():
    positive = torch.tensor([[True, False]])
    close(losses.positive_nll(t(-2, float("nan")), positive), t(2, 0))


def test_value_clip_takes_the_larger_error():
    # V 1, V_b 0, clip .5: near = .5.  R = 2: max(1, 2.25) / 2.  R = .5: max(.25, 0) / 2.
    loss, stats = losses.value_clip(t(1, 1), t(0, 0), t(2, 0.5), clip=0.5)
    close(loss, t(1.125, 0.125))
    assert stats["value_clipped"].tolist() == [[1, 0]]


def test_value_clip_gradient_matches_finite_differences():
    value = t(1.0, 1.0, -0.3, 0.2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: losses.value_clip(v, t(0, 0, 0.1, 0.1), t(2, 0.5, 1, 0), clip=0.5)[0], value
    )


def test_offpolicy_sequence_mask_drops_only_bad_sequences_that_drifted():
    document, mask = torch.tensor([[0, 0, 1, 2]]), torch.ones(1, 4, dtype=torch.bool)
    behavior = t(1.0, 0.2, 0.6, 0.4)  # mean drift .6, .6 and .4 nats
    keep = losses.offpolicy_sequence_mask(
        0 * behavior, behavior, t(-1, -1, 1, -1), document_BT=document, mask_BT=mask, limit=0.5
    )
    assert keep.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("name", [name for name in ALL if name not in (*STOP_GRADIENT, "gspo_token", "clip_cov")])
def test_gradient_matches_finite_differences(name):
    logp, behavior, adv, mask, document = batch()
    assert torch.autograd.gradcheck(
        lambda x: torch.where(mask, run(name, x, behavior, adv, mask, document)[0], 0.0), logp.requires_grad_()
    )


@pytest.mark.parametrize("name", STOP_GRADIENT)
def test_gradient_of_a_held_weight_is_weight_times_advantage(name):
    logp, behavior, adv, mask, document = batch()
    x = logp.clone().requires_grad_()
    loss, _ = run(name, x, behavior, adv, mask, document)
    loss[mask].sum().backward()
    close(x.grad[mask], (loss.detach() / logp)[mask])


@pytest.mark.parametrize("name", [name for name in ALL if name != "clip_cov"])
def test_every_policy_loss_has_the_gradient_of_reinforce_on_policy(name):
    logp, _, adv, mask, document = batch()
    length = torch.tensor([3.0, 2.0, 3.0])[document]
    weight = torch.where(mask, 1 / length, 0.0).double()
    _, grad, stats = gradient(name, weight, logp, logp.clone(), adv, mask, document)
    close(grad, -adv * weight)
    assert stats["ratio"][mask].eq(1).all()  # T14: at the first update the ratio is exactly 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("planted", [float("inf"), float("-inf"), float("nan"), -1e10])
def test_t20_what_lies_under_the_mask_changes_nothing(name, planted):
    logp, behavior, adv, mask, document = batch()
    weight = mask.double() / mask.sum()
    clean = gradient(name, weight, logp, behavior, adv, mask, document)
    dirty = gradient(name, weight, *(torch.where(mask, x, planted) for x in (logp, behavior, adv)), mask, document)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert dirty[1][~mask].eq(0).all() and dirty[1].isfinite().all()
    for key, figure in dirty[2].items():
        assert torch.equal(figure[mask], clean[2][key][mask]) and figure.isfinite().all(), key


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite_in_float32(name, gap):
    logp, _, adv, mask, document = batch(torch.float32)
    loss, grad, stats = gradient(name, mask.float(), logp, logp - gap, adv, mask, document)
    assert loss.isfinite() and grad.isfinite().all()
    assert all(figure.isfinite().all() for figure in stats.values())


@pytest.mark.parametrize("name", ALL)
def test_no_loss_writes_into_its_arguments(name):
    arguments = batch()
    copies = [x.clone() for x in arguments]
    run(name, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, copies, strict=True))


def test_weighted_sum_with_weights_of_one_over_the_count_is_the_mean_over_ranks():
    # Two ranks with 8 of the step's 16 trained tokens each: the engine averages their gradients, so each counts double.
    logp, _, _, mask, _ = batch()
    assert int(mask.sum()) == 8
    one_rank = losses.weighted_sum(logp, mask / 16, dp_size=2)
    close(one_rank, logp[mask].sum() * 2 / 16)
    close((one_rank + one_rank) / 2, logp[mask].mean())


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean", "seq_sum_const", "prompt_mean"])
@pytest.mark.parametrize("name", [*TOKEN, *SEQUENCE])  # the others choose their tokens within a micro-batch
def test_t1_a_weighted_loss_is_the_same_for_every_split_into_sequences(name, mode):
    logp, behavior, adv, mask, document = batch()
    lengths, groups = [3, 2, 3], [0, 0, 1]
    per_document = token_weights(mode, lengths, groups, count(lengths, groups), max_tokens=4)
    weight = torch.where(mask, torch.tensor(per_document, dtype=torch.float64)[document], 0.0)
    whole, grad, _ = gradient(name, weight, logp, behavior, adv, mask, document)
    parts = [
        gradient(name, torch.where(own, weight, 0.0), logp, behavior, adv, mask & own, torch.where(own, document, -1))
        for own in (document == i for i in range(3))
    ]
    close(sum(total for total, _, _ in parts), whole)
    close(sum(part for _, part, _ in parts), grad)
