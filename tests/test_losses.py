import pytest
import torch

from rlpost.losses import nll, ppo_clip, weighted_sum

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
TRASH = (float("inf"), float("-inf"), float("nan"), -1e10)


def random_case(shape=(3, 7), seed=0):
    dice = torch.Generator().manual_seed(seed)
    logp, behavior, adv = (torch.randn(shape, generator=dice, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=dice) < 0.6
    return -logp.abs(), -behavior.abs(), adv, mask


def mean_of(mask, count=None):
    """The weights of a mean over the trained tokens of an optimizer step that has `count` of them."""
    return mask.double() / (int(mask.sum()) if count is None else count)


def test_ppo_clip_matches_hand_table():
    rho = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.0])
    loss, stats = ppo_clip(rho.log(), torch.zeros(6), adv, clip_low=0.2, clip_high=0.2)
    # Clipped only where the bound is pessimistic.
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2, 0.0]))
    torch.testing.assert_close(stats["ratio"], rho)
    assert stats["clipped"].tolist() == [1, 0, 0, 1, 0, 0]


def test_ppo_clip_higher_bound_applies_above_and_lower_below():
    rho, adv = torch.tensor([1.25, 1.4, 0.85, 0.7]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, _ = ppo_clip(rho.log(), torch.zeros(4), adv, **CLIP)
    torch.testing.assert_close(loss, torch.tensor([-1.25, -1.28, 0.85, 0.8]))


def test_ppo_clip_gradient_matches_finite_differences():
    logp, behavior, adv, _ = random_case()

    def loss(logp):
        return ppo_clip(logp, behavior, adv, **CLIP)[0]

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


def test_t14_first_update_has_ratio_one_and_the_policy_gradient():
    logp, _, adv, _ = random_case()
    logp.requires_grad_()
    loss, stats = ppo_clip(logp, logp.detach().clone(), adv, **CLIP)
    loss.sum().backward()
    assert bool((stats["ratio"] == 1).all()) and not stats["clipped"].any()
    torch.testing.assert_close(logp.grad, -adv, rtol=0, atol=0)


def test_ppo_clip_gives_no_gradient_where_the_clip_is_active():
    logp = torch.tensor([1.5, 0.5]).log().requires_grad_()
    loss, stats = ppo_clip(logp, torch.zeros(2), torch.tensor([1.0, -1.0]), **CLIP)
    loss.sum().backward()
    assert logp.grad.tolist() == [0, 0] and stats["clipped"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [90.0, -90.0, 1e10, -1e10])
def test_t20_extreme_log_ratios_stay_finite(gap, dtype):
    logp = torch.tensor([gap, gap], dtype=dtype, requires_grad=True)
    loss, stats = ppo_clip(logp, torch.zeros(2, dtype=dtype), torch.tensor([1.0, -1.0], dtype=dtype), **CLIP)
    loss.sum().backward()
    for tensor in (loss, logp.grad, *stats.values()):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("trash", [1e10, -1e10, 1e30])
def test_t20_masked_positions_have_no_gradient_and_change_nothing(trash):
    logp, behavior, adv, mask = random_case()
    values, grads = [], []
    for fill in (0.0, trash):
        mine = logp.masked_fill(~mask, fill).requires_grad_()
        loss, _ = ppo_clip(mine, behavior.masked_fill(~mask, fill / 2), adv.masked_fill(~mask, fill), **CLIP)
        total = weighted_sum(loss, mean_of(mask), 1)
        total.backward()
        values.append(total.item())
        grads.append(mine.grad)
    assert values[0] == values[1]
    assert torch.equal(grads[0], grads[1])
    assert bool((grads[1][~mask] == 0).all())


@pytest.mark.parametrize("trash", TRASH)
def test_t20_reducer_reads_nothing_under_the_mask(trash):
    _, _, x, mask = random_case()
    dirty = x.masked_fill(~mask, trash).requires_grad_()
    total = weighted_sum(dirty, mean_of(mask), 1)
    total.backward()
    torch.testing.assert_close(total, x[mask].mean())
    torch.testing.assert_close(dirty.grad, mean_of(mask), rtol=0, atol=0)


def test_losses_never_write_into_their_arguments():
    case = *random_case(), mean_of(random_case()[3])
    before = [tensor.clone() for tensor in case]
    logp, behavior, adv, _, weight = case
    loss, _ = ppo_clip(logp, behavior, adv, **CLIP)
    nll(logp)
    weighted_sum(loss, weight, 2)
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))


def test_stats_carry_no_graph():
    logp = torch.zeros(2, requires_grad=True)
    _, stats = ppo_clip(logp, torch.zeros(2), torch.ones(2), **CLIP)
    assert not any(tensor.requires_grad for tensor in stats.values())


def test_nll_is_minus_logp():
    assert nll(torch.tensor([-0.5, -2.0])).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("rows", [[12], [4, 4, 4], [1] * 12, [7, 5], [11, 1]])
def test_t1_weighted_sum_is_the_same_for_every_split_into_micro_batches(rows):
    _, _, x, mask = random_case((12, 9), seed=1)
    count = int(mask.sum())
    parts = zip(x.split(rows), mask.split(rows), strict=True)
    total = sum(weighted_sum(part, mean_of(kept, count), 1) for part, kept in parts)
    torch.testing.assert_close(total, x[mask].mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shares", [[6, 6], [1, 11], [3, 3, 3, 3], [0, 12]])
def test_t5_mean_over_ranks_of_weighted_sum_is_the_global_token_mean(shares):
    _, _, x, mask = random_case((12, 9), seed=2)
    count, size = int(mask.sum()), len(shares)
    ranks = zip(x.split(shares), mask.split(shares), strict=True)
    total = sum(weighted_sum(part, mean_of(kept, count), size) for part, kept in ranks) / size
    torch.testing.assert_close(total, x[mask].mean(), rtol=1e-12, atol=1e-12)


def test_t6_a_fully_masked_row_is_left_out_and_a_masked_batch_gives_zero():
    x = torch.tensor([[1.0, 3.0], [50.0, 60.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    assert weighted_sum(x, mean_of(mask), 1).item() == 2.0
    nothing = weighted_sum(x, torch.zeros(2, 2), 4)
    nothing.backward()
    assert nothing.item() == 0.0 and not x.grad.any()
