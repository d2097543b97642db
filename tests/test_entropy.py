"""Entropy bonus, its adaptive coefficient, and the top-entropy mask."""

import pytest
import torch

from rlpost.entropy import adapted_entropy_coef, entropy_bonus, entropy_threshold, top_entropy_mask


def test_bonus_is_a_negative_loss_with_its_gradient():
    entropy = torch.tensor([[2.0, 0.5]], requires_grad=True)
    loss = entropy_bonus(entropy, coef=0.1)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[-0.2, -0.05]]))
    torch.testing.assert_close(entropy.grad, torch.tensor([[-0.1, -0.1]]))


@pytest.mark.parametrize(
    ("entropy", "coef", "expected"),
    [(0.1, 0.01, 0.015), (0.2, 0.01, 0.015), (0.3, 0.01, 0.005), (0.3, 0.0, 0.0), (0.1, 1.0, 1.0)],
)
def test_adaptive_coefficient_rises_at_or_below_the_target_and_stays_in_bounds(entropy, coef, expected):
    found = adapted_entropy_coef(coef, entropy, target=0.2, delta=0.005, low=0.0, high=1.0)
    assert found == pytest.approx(expected)


def test_top_entropy_mask_keeps_the_highest_fifth_of_the_step():
    entropies = torch.arange(10.0)
    threshold = entropy_threshold(entropies, frac=0.2)
    assert threshold == 8.0
    mask = torch.ones(1, 10, dtype=torch.bool)
    assert top_entropy_mask(entropies[None], mask, threshold=threshold).nonzero()[:, 1].tolist() == [8, 9]


def test_top_entropy_mask_is_the_same_for_every_split_into_micro_batches():
    entropy = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 8, dtype=torch.bool)
    threshold = entropy_threshold(entropy.flatten(), frac=0.25)
    rows = [top_entropy_mask(e[None], m[None], threshold=threshold) for e, m in zip(entropy, mask, strict=True)]
    assert torch.equal(torch.cat(rows), top_entropy_mask(entropy, mask, threshold=threshold))
    assert int(torch.cat(rows).sum()) == 8


def test_t20_top_entropy_mask_never_keeps_an_untrained_token():
    kept = top_entropy_mask(
        torch.tensor([[float("nan"), float("inf"), 1.0]]), torch.tensor([[False, False, True]]), threshold=0.5
    )
    assert kept.tolist() == [[False, False, True]]


def test_a_share_of_one_keeps_every_token_and_a_tiny_one_keeps_one():
    entropies = torch.tensor([0.0, 0.3, 0.1])
    assert entropy_threshold(entropies, frac=1.0) == 0.0
    assert entropy_threshold(entropies, frac=0.01) == pytest.approx(0.3)
