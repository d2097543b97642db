import math

import pytest
import torch

from rlpost.advantages import grpo

NAN = math.nan


def advantages(rewards, *, scale_by_std=True, eps=0.0):
    return grpo(torch.tensor(rewards, dtype=torch.float64), scale_by_std=scale_by_std, eps=eps).tolist()


def test_t8_std_has_the_unbiased_divisor():
    assert advantages([1.0, 2.0, 3.0]) == [-1.0, 0.0, 1.0]
    assert advantages([1.0, 2.0, 3.0], eps=1.0) == [-0.5, 0.0, 0.5]


def test_without_scaling_only_the_mean_is_taken_off():
    assert advantages([1.0, 0.0, 0.0, 0.0], scale_by_std=False) == [0.75, -0.25, -0.25, -0.25]


def test_one_right_of_four_matches_hand_table():
    # mean 1/4, sum of squares 3/4, std sqrt(3/4 / 3) = 1/2
    assert advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-15)


def test_default_eps_is_added_to_the_std():
    got = grpo(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), scale_by_std=True)
    assert got.tolist() == pytest.approx([0.75 / 0.500001, *[-0.25 / 0.500001] * 3], rel=1e-12)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 7, 64, 1000])
def test_t9_constant_rewards_give_exactly_zero(size, dtype, scale_by_std):
    assert grpo(torch.full((size,), 0.1, dtype=dtype), scale_by_std=scale_by_std).tolist() == [0.0] * size


@pytest.mark.parametrize("rewards", [[5.0], [NAN, 5.0], [NAN, NAN], [NAN]])
def test_t8_with_fewer_than_two_judged_there_is_nothing_to_compare(rewards):
    assert advantages(rewards) == [0.0] * len(rewards)


def test_t38_unjudged_rewards_stay_out_of_the_baseline_and_get_zero():
    assert advantages([1.0, NAN, 2.0, 3.0, NAN]) == [-1.0, 0.0, 0.0, 0.0 + 1.0, 0.0]
    assert advantages([1.0, NAN, 0.0], scale_by_std=False) == [0.5, 0.0, -0.5]


def test_t9_constant_rewards_beside_unjudged_ones_give_exactly_zero():
    assert advantages([0.1, NAN, 0.1, 0.1]) == [0.0] * 4


def test_t10_scaled_advantages_do_not_depend_on_the_unit_of_the_reward():
    rewards = [0.0, 1.0, 0.3, 0.7]
    scaled = [1000 * reward + 5 for reward in rewards]
    assert advantages(scaled) == pytest.approx(advantages(rewards), rel=1e-9)
    assert torch.tensor(advantages(rewards)).std().item() == pytest.approx(1.0, rel=1e-6)


def test_advantages_sum_to_zero_and_leave_the_rewards_alone():
    rewards = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = rewards.clone()
    assert abs(grpo(rewards, scale_by_std=True).sum().item()) < 1e-12
    assert torch.equal(rewards, before)
