"""Hand tables of every advantage, what an unjudged reward does, and whitening over ranks. Tn names a known trap."""

from functools import partial
from math import nan, sqrt

import pytest
import torch

from rlpost import advantages
from rlpost.advantages import Moments, mean_baseline, moments, no_moments

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def ones(values):
    return [torch.ones_like(x) for x in values]


def test_grpo_matches_hand_table():
    # mean 2, unbiased std 1.
    close(advantages.grpo(t(1, 2, 3), scale_by_std=True), t(-1, 0, 1))
    close(advantages.grpo(t(0, 0, 0, 1), scale_by_std=True), t(-0.5, -0.5, -0.5, 1.5))  # mean .25, std .5


def test_dr_grpo_takes_off_the_mean_only():
    close(advantages.dr_grpo(t(1, 2, 6)), t(-2, -1, 3))


def test_rloo_compares_with_the_mean_of_the_others():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    close(advantages.rloo(t(1, 2, 6)), t(-3, -1.5, 4.5))


def test_remax_compares_with_the_greedy_answer():
    close(advantages.remax(t(1, 0, nan), 0.25), t(0.75, -0.25, 0))
    close(advantages.remax(t(1, 0), nan), t(0, 0))


def test_opo_baseline_is_weighted_by_length():
    # (10 * 1 + 30 * 0) / 40 = .25
    close(advantages.opo(t(1, 0), torch.tensor([10, 30])), t(0.75, -0.25))
    close(advantages.opo(t(1, nan, 0), torch.tensor([10, 500, 30])), t(0.75, 0, -0.25))


def test_passk_gives_the_best_its_lead_and_a_tie_nothing():
    close(advantages.passk(t(0, 3, 1), scale_by_std=False), t(0, 2, 0))
    close(advantages.passk(t(1, 1, 0), scale_by_std=False), t(0, 0, 0))
    close(advantages.passk(t(1, 2, 3), scale_by_std=True), t(0, 0, 1))  # lead 1, std 1
    close(advantages.passk(t(nan, 1, -2), scale_by_std=False), t(0, 3, 0))


@pytest.mark.parametrize(("estimator", "expected"), [("sample", 1.0), ("population", 0.8164966)])
def test_t8_the_divisor_of_the_std_is_n_minus_one(estimator, expected):
    # T8: of [1, 2, 3], 1.0 with n - 1 and .8165 with n. Ours is the first.
    scaled = advantages.grpo(t(1, 2, 3), scale_by_std=True)[2]
    assert (abs(float(scaled) * expected - 1) < 1e-5) is (estimator == "sample")


METHODS = {
    "grpo": partial(advantages.grpo, scale_by_std=True),
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "passk": partial(advantages.passk, scale_by_std=True),
    "opo": lambda rewards: advantages.opo(rewards, torch.arange(1, len(rewards) + 1)),
    "batch_std": lambda rewards: advantages.batch_std(
        [rewards], moments([mean_baseline(rewards)], ones([rewards])) + moments([t(1, 0)], [t(1, 1)])
    )[0],
    "reinforce_pp": lambda rewards: advantages.reinforce_pp([rewards], moments([rewards], ones([rewards])))[0],
    "reinforce_pp_baseline": lambda rewards: advantages.reinforce_pp_baseline(
        [rewards], moments([mean_baseline(rewards)], ones([rewards]))
    )[0],
    "gdpo": lambda rewards: advantages.gdpo(
        [rewards[None]], [1.0], moments([advantages.gdpo_sum(rewards[None], [1.0])], ones([rewards]))
    )[0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rollouts", [7, 63, 64])
def test_t9_equal_rewards_give_exactly_zero(method, dtype, num_rollouts):
    assert METHODS[method](torch.full((num_rollouts,), 0.1, dtype=dtype)).eq(0).all()


def test_t9_moments_of_equal_values_have_no_spread():
    found = moments([torch.full((n,), 0.1) for n in (7, 63)], [torch.ones(7), torch.full((63,), 5)])
    assert (found.mean, found.std) == (float(torch.tensor(0.1)), 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_t8_a_group_of_one_gets_zero(method):
    assert METHODS[method](t(0.7)).tolist() == [0.0]


@pytest.mark.parametrize("method", METHODS)
def test_t38_an_unjudged_reward_gets_zero_and_changes_nothing_for_the_others(method):
    whole, holed = METHODS[method](t(1, 0, 0)), METHODS[method](t(1, 0, 0, nan))
    close(holed[:3], whole)
    assert holed[3] == 0
    assert METHODS[method](t(nan, nan)).tolist() == [0.0, 0.0]
    assert METHODS[method](t(nan, 5)).tolist() == [0.0, 0.0]


def test_t23_truncated_samples_masked_before_or_after_the_baseline():
    # Before: NaN, the baseline is that of the two that ended. After: it counts as 0 in the baseline, then is masked.
    close(advantages.dr_grpo(t(1, 0, nan)), t(0.5, -0.5, 0))
    close(advantages.dr_grpo(t(1, 0, 0)) * t(1, 1, 0), t(2 / 3, -1 / 3, 0))


def test_t10_each_method_normalises_once():
    # Groups (1, 0) and (.1, .1): the second has no spread. Centred: (.5, -.5), (0, 0); their std, n - 1: sqrt(1/6).
    # Raw rewards: mean .3, sum of squares about it .66, std sqrt(.22).
    groups = [t(1, 0), t(0.1, 0.1)]
    centred = moments([mean_baseline(g) for g in groups], ones(groups))
    table = {
        "grpo": ([advantages.grpo(g, scale_by_std=True) for g in groups], 0.5 / sqrt(0.5)),
        "batch_std": (advantages.batch_std(groups, centred), 0.5 * sqrt(6)),
        "batch_std of raw rewards": (advantages.batch_std(groups, moments(groups, ones(groups))), 0.5 / sqrt(0.22)),
        "reinforce_pp_baseline": (advantages.reinforce_pp_baseline(groups, centred), 0.5 * sqrt(6)),
    }
    for name, (found, expected) in table.items():
        torch.testing.assert_close(found, [t(expected, -expected), t(0, 0)], rtol=1e-5, atol=1e-6, msg=name)


def test_reinforce_pp_whitens_over_tokens():
    # rewards 1 (3 tokens) and 0 (1 token): mean .75, variance 3 * .25 * .75 / 3 = .25, over n - 1 = 3 tokens.
    rewards, tokens = [t(1), t(0)], [t(3), t(1)]
    found = advantages.reinforce_pp(rewards, moments(rewards, tokens))
    torch.testing.assert_close(found, [t(0.5), t(-1.5)], rtol=1e-5, atol=1e-6)


def test_decoupled_normalisation_counts_tokens_or_rollouts():
    # Centred (.5, -.5). By rollouts: std sqrt(.5). By tokens 3 and 1: mean .25, variance (3/16 + 9/16) / 3 = .25.
    rewards = [t(1, 0)]
    by_rollout = advantages.reinforce_pp_baseline(rewards, moments([mean_baseline(rewards[0])], [t(1, 1)]))
    by_token = advantages.reinforce_pp_baseline(rewards, moments([mean_baseline(rewards[0])], [t(3, 1)]))
    close(by_rollout[0], t(sqrt(0.5), -sqrt(0.5)))
    close(by_token[0], t(0.5, -1.5))


def test_token_weighted_moments_are_the_moments_of_the_repeated_values():
    found = moments([t(1, -2, 5)], [t(2, 3, 1)])
    every = t(1, 1, -2, -2, -2, 5)
    assert found.mean == pytest.approx(float(every.mean()))
    assert found.std == pytest.approx(float(every.std()))


def test_gdpo_keeps_a_small_reward_apart_from_a_large_one():
    # Each part normalises to (.7071, -.7071) or its negative: the sums are (0, 0) and (1.4142, -1.4142).
    parts = [torch.stack([t(100, 0), t(0, 1)]), torch.stack([t(100, 0), t(1, 0)])]
    raw = [advantages.gdpo_sum(p, [1.0, 1.0]) for p in parts]
    torch.testing.assert_close(raw, [t(0, 0), t(sqrt(2), -sqrt(2))], rtol=1e-5, atol=1e-6)
    # mean 0, variance (2 + 2) / 3: whitened by sqrt(4 / 3).
    whitened = advantages.gdpo(parts, [1.0, 1.0], moments(raw, ones(raw)))
    torch.testing.assert_close(whitened[1], t(sqrt(1.5), -sqrt(1.5)), rtol=1e-5, atol=1e-6)


def test_gdpo_part_that_is_unjudged_adds_nothing():
    found = advantages.gdpo_sum(torch.stack([t(1, 0, nan), t(1, 0, nan), t(nan, 5, nan)]), [1.0, 2.0, 9.0])
    close(found[:2], t(3 * sqrt(0.5), -3 * sqrt(0.5)))
    assert found[2].isnan()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("by_token", [False, True])
def test_t31_whitening_does_not_depend_on_how_groups_lie_on_ranks(num_ranks, by_token):
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(8)]
    raw[2][1] = nan
    lengths = [torch.randint(0, 9, (3,), generator=generator) for _ in raw]  # 0: nothing trained, not counted
    counts = lengths if by_token else ones(raw)
    ranks = [moments(raw[r::num_ranks], counts[r::num_ranks]) for r in range(num_ranks)]
    repeated = torch.cat(
        [torch.repeat_interleave(x[~x.isnan()], c[~x.isnan()].long()) for x, c in zip(raw, counts, strict=True)]
    )
    expected = [((x - repeated.mean()) / (repeated.std() + 1e-6)).nan_to_num(0) for x in raw]
    torch.testing.assert_close(advantages.whiten(raw, sum(ranks, no_moments())), expected, rtol=1e-12, atol=1e-12)


def test_moments_of_nothing_whiten_to_zero():
    assert no_moments() == Moments(0, 0, 0, float("inf"), float("-inf"))
    assert advantages.whiten([t(nan)], no_moments())[0].tolist() == [0.0]


def test_gae_matches_hand_table():
    # gamma 1, lambda .5, V = (1, 2, 3), reward 4 at the end: delta = (1, 1, 1), A = (1 + .5 + .25, 1 + .5, 1).
    close(advantages.gae(t(0, 0, 4), t(1, 2, 3), gamma=1.0, lam=0.5), t(1.75, 1.5, 1))
    # gamma .5: delta = (1 - 1, 1.5 - 2, 4 - 3) = (0, -.5, 1); gamma lambda .25: A_1 = -.25, A_0 = -.0625.
    close(advantages.gae(t(0, 0, 4), t(1, 2, 3), gamma=0.5, lam=0.5), t(-0.0625, -0.25, 1))


def test_gae_at_lambda_one_is_the_monte_carlo_return_less_the_value():
    close(advantages.gae(t(1, 2, 3), t(5, 7, 9), gamma=1.0, lam=1.0) + t(5, 7, 9), t(6, 5, 3))


def test_gae_bootstraps_where_the_answer_was_cut():
    close(advantages.gae(t(0, 0), t(1, 2), gamma=1.0, lam=1.0, bootstrap=3.0), t(2, 1))


def test_gae_with_two_lambdas_is_two_calls():
    rewards, values = t(0, 0, 1), t(0.2, 0.4, 0.5)
    actor = advantages.gae(rewards, values, gamma=1.0, lam=0.95)
    returns = advantages.gae(rewards, values, gamma=1.0, lam=1.0) + values
    close(actor, t(0.2 + 0.95 * (0.1 + 0.95 * 0.5), 0.1 + 0.95 * 0.5, 0.5))
    close(returns, t(1, 1, 1))


def test_t30_tokens_the_policy_did_not_write_are_left_out_of_gae():
    # Rewards 1, 2, 3, the middle token an observation. With it the returns are 6, 5, 3; without it, as here, 4, 3.
    rewards, written = t(1, 2, 3), torch.tensor([True, False, True])
    close(advantages.gae(rewards, 0 * rewards, gamma=1.0, lam=1.0), t(6, 5, 3))
    close(advantages.gae(rewards[written], t(0, 0), gamma=1.0, lam=1.0), t(4, 3))


def test_vapo_lambda_grows_with_the_length_and_is_never_negative():
    # sum of lambda^t = alpha l, hence 1 / (1 - lambda) = alpha l.
    assert advantages.vapo_lambda(1000, alpha=0.05) == pytest.approx(0.98)
    assert [advantages.vapo_lambda(length) for length in (0, 1, 19, 20)] == [0, 0, 0, 0]
    assert advantages.vapo_lambda(21) > 0


def test_no_advantage_writes_into_its_arguments():
    rewards = t(1, nan, 0, 0.5)
    for method in METHODS.values():
        method(rewards)
    torch.testing.assert_close(rewards, t(1, nan, 0, 0.5), equal_nan=True)
