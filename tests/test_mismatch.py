"""Weights and figures of the generator-trainer mismatch. Tn names a known trap."""

from functools import partial
from math import e, exp, log

import pytest
import torch

from rlpost import mismatch
from rlpost.losses import ppo_clip

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
DOCUMENT = torch.tensor([[0, 0, 1, 1, -1]])
MASK = torch.tensor([[True, True, True, True, False]])
WHERE = {"document_BT": DOCUMENT, "mask_BT": MASK}


def t(*values):
    return torch.tensor([values], dtype=torch.float64)


RHO = t(4, 0.5, 0.25, 1, 1)  # products 2 and .25; geometric means 1.4142 and .5
WEIGHTS = {
    "tis_token": (partial(mismatch.tis_token, mask_BT=MASK, cap=2.0), t(2, 0.5, 0.25, 1, 1)),
    "tis_sequence": (partial(mismatch.tis_sequence, **WHERE, cap=1.5), t(1.5, 1.5, 0.25, 0.25, 1)),
    "mis_token": (partial(mismatch.mis_token, mask_BT=MASK, cap=2.0), t(0, 0.5, 0.25, 1, 1)),
    "mis_sequence": (partial(mismatch.mis_sequence, **WHERE, cap=1.5), t(0, 0, 0.25, 0.25, 1)),
    "icepop": (partial(mismatch.icepop, mask_BT=MASK, low=0.4, high=2.0), t(0, 0.5, 0, 1, 1)),
    "geometric_rejection": (partial(mismatch.geometric_rejection, **WHERE, low=0.9, high=2.0), t(1, 1, 0, 0, 1)),
    # k3 of (4, .5): (3 - 1.3863, -.5 + .6931), mean .9034; of (.25, 1): (-.75 + 1.3863, 0), mean .3181.
    "k3_rejection": (partial(mismatch.k3_rejection, **WHERE, limit=0.5), t(0, 0, 1, 1, 1)),
}
CAPS = {"tis_token": 2.0, "tis_sequence": 1.5, "mis_token": 2.0, "mis_sequence": 1.5, "icepop": 2.0}


@pytest.mark.parametrize("mode", WEIGHTS)
def test_weights_match_hand_table(mode):
    weigh, expected = WEIGHTS[mode]
    behavior = t(-1, -2, -3, -4, 0)
    close(weigh(behavior + RHO.log(), behavior), expected)


@pytest.mark.parametrize("mode", WEIGHTS)
@pytest.mark.parametrize("gap", [0.0, 0.5, 30.0, 1e4, -1e4])
def test_t19_no_weight_exceeds_its_cap(mode, gap):
    behavior = t(-1, -2, -3, -4, 0)
    weight = WEIGHTS[mode][0](behavior + gap, behavior)
    assert weight.isfinite().all() and weight.max() <= CAPS.get(mode, 1.0)


@pytest.mark.parametrize("mode", WEIGHTS)
def test_weights_are_detached(mode):
    prox, behavior = t(-1, -2, -3, -4, 0).requires_grad_(), t(-1, -2, -3, -4, 0).requires_grad_()
    assert not WEIGHTS[mode][0](prox, behavior).requires_grad


@pytest.mark.parametrize("mode", WEIGHTS)
@pytest.mark.parametrize("planted", [float("nan"), float("inf"), float("-inf"), -1e10])
def test_t20_t34_what_lies_under_the_mask_is_neutral(mode, planted):
    behavior = t(-1, -2, -3, -4, 0)
    prox = behavior + RHO.log()
    weigh, _ = WEIGHTS[mode]
    dirty = weigh(torch.where(MASK, prox, planted), torch.where(MASK, behavior, planted))
    assert torch.equal(dirty, weigh(prox, behavior)) and dirty[0, 4] == 1


@pytest.mark.parametrize("mode", WEIGHTS)
def test_t15_without_mismatch_decoupled_and_bypass_are_the_same(mode):
    logp, prox, adv = t(-1.1, -1.9, -3, -4, 0), t(-1, -2, -3, -4, 0), t(1, 1, -1, -1, 0)
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    bypass, _ = ppo_clip(logp, prox, adv, **clip)
    decoupled, _ = ppo_clip(logp, prox, adv, **clip)
    close(decoupled * WEIGHTS[mode][0](prox, prox.clone()), bypass)


def test_t15_an_offset_of_the_generator_goes_into_the_weight_and_not_into_the_ratio():
    behavior = t(-1, -2, -3, -4, 0)
    prox = behavior + 0.1
    weight = mismatch.tis_token(prox, behavior, mask_BT=MASK, cap=2.0)
    close(weight[MASK], torch.full((4,), exp(0.1), dtype=torch.float64))
    _, stats = ppo_clip(prox, prox, t(1, 1, 1, 1, 0), clip_low=0.2, clip_high=0.2)
    assert stats["ratio"].eq(1).all()


def test_t18_sequence_is_the_product_and_geometric_is_the_mean():
    # 1000 tokens with d log p = 1e-3 each: the product is e, the geometric mean e^.001 = 1.0010.
    behavior = torch.zeros(1, 1000, dtype=torch.float64)
    where = {"document_BT": torch.zeros(1, 1000, dtype=torch.int64), "mask_BT": behavior == 0}
    prox = behavior + 1e-3
    close(mismatch.tis_sequence(prox, behavior, **where, cap=100.0), torch.full_like(behavior, e))
    inside = mismatch.geometric_rejection(prox, behavior, **where, low=1.0009, high=1.0011)
    assert inside.eq(1).all()


def test_t17_truncated_sampling_without_replay_has_the_kept_mass_as_its_ratio():
    # The generator keeps 3 of 5 tokens (top-k) and renormalises; the trainer sees the whole vocabulary.
    p = torch.softmax(torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0], dtype=torch.float64), 0)
    kept, mask = p[:3] / p[:3].sum(), torch.ones(1, 3, dtype=torch.bool)
    plain = mismatch.tis_token(p[:3].log()[None], kept.log()[None], mask_BT=mask, cap=2.0)
    close(plain, p[:3].sum().expand(1, 3))
    replayed = torch.log_softmax(torch.where(torch.arange(5) < 3, p.log(), -torch.inf), 0)[:3]
    close(mismatch.tis_token(replayed[None], kept.log()[None], mask_BT=mask, cap=2.0), torch.ones_like(plain))


def test_weights_multiply_into_truncation_of_the_kept_sequences():
    behavior = t(-1, -2, -3, -4, 0)
    product = WEIGHTS["tis_token"][0](behavior + RHO.log(), behavior) * WEIGHTS["geometric_rejection"][0](
        behavior + RHO.log(), behavior
    )
    close(product, t(2, 0.5, 0, 0, 1))


def test_summary_matches_hand_table():
    # rho (2, .5): k1 of KL(mu || pi) 0, k3 (2 - 1 - ln 2 + .5 - 1 + ln 2) / 2 = .25. Weights (1.5, .5): 4 / (2 * 2.5).
    found = mismatch.mismatch_summary(torch.tensor([log(2), -log(2)]), torch.tensor([1.5, 0.5]))
    assert found == pytest.approx({
        "logp_diff_mean": log(2), "logp_diff_p99": log(2), "logp_diff_max": log(2),
        "k1": 0.0, "k3": 0.25, "ess_frac": 0.8, "clipped_frac": 0.5,
    }, abs=1e-7)  # fmt: skip


def test_summary_of_nothing_says_nothing_and_of_all_masked_has_no_sample():
    assert mismatch.mismatch_summary(torch.zeros(0), torch.zeros(0)) == {}
    assert mismatch.mismatch_summary(torch.zeros(3), torch.zeros(3))["ess_frac"] == 0.0


def test_summary_stays_finite_for_extreme_ratios():
    found = mismatch.mismatch_summary(torch.tensor([1e4, -1e4]), torch.tensor([2.0, 0.0]))
    assert all(abs(value) < float("inf") for value in found.values())


def test_p99_is_an_order_statistic():
    values = torch.arange(1, 201, dtype=torch.float64)
    assert mismatch.quantile(values, 0.99) == 198
    assert mismatch.quantile(values[:1], 0.99) == 1


def test_by_age_splits_the_tokens():
    found = mismatch.mismatch_by_age(torch.tensor([0.1, 0.3, 0.5]), torch.ones(3), torch.tensor([0, 2, 2]))
    assert list(found) == [0, 2]
    assert found[2]["logp_diff_mean"] == pytest.approx(0.4)
