"""The theorem against the softmax that it is about, and its estimate from rollouts against tries worked out by hand."""

import math
import time
from functools import partial
from itertools import product
from random import Random

import pytest
import torch

from rlpost.mass_balance import of_group, theorem

NAN = math.nan
close = partial(pytest.approx, rel=1e-12, abs=1e-15)


def random_case(seed, num_tokens=50, num_draws=8):
    """Logits, which tokens are correct, and which were drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, dtype=torch.float64, generator=generator) * 1.5
    correct = torch.rand(num_tokens, generator=generator) < 0.3
    drawn = torch.multinomial(torch.softmax(logits, 0), num_draws, replacement=True, generator=generator)
    return logits, correct, torch.isin(torch.arange(num_tokens), drawn)


# The theorem.


def test_theorem_matches_hand_table():
    # Q = 0.6, S = 1 * 0.4 - 0.5 * 0.3 = 0.25; A_2 = 0.16, B_2 = 0.09, U_correct = 0.04, U_wrong = 0.01.
    p = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    correct, drawn = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    found = theorem(p, correct, drawn, r_correct=1.0, r_wrong=-0.5, eta_over_n=2.0)
    assert (found.q_pos, found.s_r) == (close(0.6), close(0.25))
    assert found.sampled_correct == close(2 * 0.75 * 0.4 * 0.16)
    assert found.sampled_incorrect == close(2 * 0.75 * 0.6 * 0.09)
    assert found.unsampled == close(2 * 0.25 * (0.6 * 0.01 - 0.4 * 0.04))
    assert found.total == close(0.096 + 0.081 - 0.005)


@pytest.mark.parametrize("rewards", [(1.0, -1.0), (1.0, 0.0), (0.2, -0.8)])
@pytest.mark.parametrize("seed", range(5))
def test_theorem_is_the_change_that_a_small_gradient_step_makes(seed, rewards):
    eta = 1e-6
    logits, correct, drawn = random_case(seed)
    reward = torch.where(drawn, torch.where(correct, *(torch.tensor(r, dtype=torch.float64) for r in rewards)), 0.0)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((reward * torch.softmax(z, 0)).sum(), z)
    p, after = torch.softmax(logits, 0), torch.softmax(logits + eta * gradient, 0)
    found = theorem(p, correct, drawn, r_correct=rewards[0], r_wrong=rewards[1], eta_over_n=eta)
    assert found.total == pytest.approx(float((after - p)[correct].sum()), rel=1e-4)


def test_drawn_tokens_never_cost_correct_mass_and_others_may():
    signs = set()
    for seed in range(200):
        logits, correct, drawn = random_case(seed)
        found = theorem(torch.softmax(logits, 0), correct, drawn, r_correct=1.0, r_wrong=-1.0)
        assert min(found.sampled_correct, found.sampled_incorrect) >= 0.0
        signs.add(found.unsampled > 0)
    assert signs == {True, False}


def test_unsampled_second_moment_vanishes_with_more_draws():
    # Lemma 2: 4,000 sets of draws give the mean to a standard error below 2 % of it, or below 1e-5.
    p = torch.softmax(random_case(3)[0], 0)
    generator, found = torch.Generator().manual_seed(1), []
    for num_draws in (4, 32, 256, 2048):
        draws = torch.multinomial(p.expand(4000, -1), num_draws, replacement=True, generator=generator)
        unseen = torch.ones(4000, len(p), dtype=torch.float64).scatter(1, draws, 0.0) @ p.square()
        exact, error = (p.square() * (1 - p) ** num_draws).sum(), unseen.std() / 4000**0.5
        assert (unseen.mean() - exact).abs() < 4 * error
        assert error < max(0.02 * exact, 1e-5)
        found.append(float(exact))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.01
    assert found[-1] < 1e-5


# The estimate from rollouts.


def one_token(draws, p, correct):
    """A group whose completions are one token long."""
    return of_group([(v,) for v in draws], [(math.log(p[v]),) for v in draws], [correct[v] for v in draws])


def test_of_group_is_the_theorem_where_every_token_was_drawn_as_often_as_is_likely():
    # 16 draws of p = 1/2, 1/4, 1/8, 1/8: Q = 5/8 in the group as in the policy, and no token was drawn only once.
    p, correct = [0.5, 0.25, 0.125, 0.125], [True, False, True, False]
    found = one_token([*[0] * 8, *[1] * 4, *[2] * 2, *[3] * 2], p, correct)
    exact = theorem(
        torch.tensor(p), torch.tensor(correct), torch.ones(4, dtype=torch.bool), r_correct=3 / 8, r_wrong=-5 / 8
    )
    assert (exact.unsampled, exact.s_r) == (0.0, 0.0)
    for name in ("sampled_correct", "sampled_incorrect", "unsampled", "q_pos", "s_r"):
        assert getattr(found.terms, name) == close(getattr(exact, name)), name
    assert (found.mixed, found.num_states, found.shared_frac) == (0.0, 1, 1.0)


def test_of_group_has_the_sampled_terms_of_the_theorem_where_some_tokens_were_not_drawn():
    # Tokens 0 and 1, p = 3/8 and 1/8, were drawn 6 and 2 times; of the rest 3/8 are correct, so that Q = 3/4 in both.
    # No token was drawn once: in this group the estimate of what was not drawn is 0.
    p, correct = [0.375, 0.125, 0.375, 0.125], [True, False, True, False]
    found = one_token([*[0] * 6, *[1] * 2], p, correct).terms
    drawn = torch.tensor([True, True, False, False])
    exact = theorem(torch.tensor(p), torch.tensor(correct), drawn, r_correct=0.25, r_wrong=-0.75)
    assert (found.q_pos, found.s_r) == (close(exact.q_pos), close(exact.s_r))
    assert found.sampled_correct == close(exact.sampled_correct)
    assert found.sampled_incorrect == close(exact.sampled_incorrect)
    assert (found.unsampled, exact.s_r) == (0.0, 0.25 * 0.375 - 0.75 * 0.125)


def test_of_group_matches_a_trie_by_hand():
    # Rollouts 1 2 pass, 1 3 fail, 1 2 pass, 4 pass, and an unjudged one that must not count.
    # At the root: n = 4, Q = 3/4; token 1 with p = 1/2, q = 2/3; token 4 with p = 1/8, q = 1, drawn once.
    ids = [(1, 2), (1, 3), (1, 2), (4,), (1, 3)]
    logp = [[math.log(x) for x in row] for row in [(0.5, 0.4), (0.5, 0.2), (0.5, 0.4), (0.125,), (0.5, 0.2)]]
    found = of_group(ids, logp, [True, False, True, True, None])
    a2, b2 = 0.25 * 2 / 3 + 1 / 64, 0.25 / 3
    s = 0.25 * (0.5 * 2 / 3 + 0.125) - 0.75 * (0.5 / 3)
    root = (0.25 - s) * 0.25 * a2, (s + 0.75) * 0.75 * b2, s * (0.75 * 0.0 - 0.25 * (0.125 / 4)), 0.75, s
    # After 1: n = 3, Q = 2/3; token 2 with p = 0.4, q = 1; token 3 with p = 0.2, q = 0, drawn once.
    s = 0.4 / 3 - 2 * 0.2 / 3
    after = (1 / 3 - s) / 3 * 0.16, (s + 2 / 3) * 2 / 3 * 0.04, s * (2 / 3 * (0.2 / 3)), 2 / 3, s
    assert s == close(0.0)
    names = ("sampled_correct", "sampled_incorrect", "unsampled", "q_pos", "s_r")
    for name, at_root, below in zip(names, root, after, strict=True):
        assert getattr(found.terms, name) == close((4 * at_root + 3 * below) / 7), name
    assert found.mixed == close(4 / 7 * 0.25 * (2 / 3) * (1 / 3))
    assert (found.num_states, found.shared_frac) == (2, 1.0)


def test_total_less_mixed_is_the_change_of_the_expected_reward():
    # Tokens that pass with q_v, all drawn: the surrogate is sum_v (q_v - Q) p_v, the value of the state sum_v q_v p_v.
    p, passes = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), [3, 1, 0]  # of 4, 2 and 2 rollouts
    q, baseline, eta = torch.tensor([3 / 4, 1 / 2, 0.0], dtype=torch.float64), 0.5, 1e-6
    z = p.log().requires_grad_()
    (gradient,) = torch.autograd.grad(((q - baseline) * torch.softmax(z, 0)).sum(), z)
    change = (torch.softmax(p.log() + eta * gradient, 0) - p) @ q / eta
    draws = [0] * 4 + [1] * 2 + [2] * 2
    passed = [n < passes[v] for v, count in enumerate((4, 2, 2)) for n in range(count)]
    found = of_group([(v,) for v in draws], [(math.log(p[v]),) for v in draws], passed)
    assert found.terms.q_pos == baseline
    assert found.terms.total - found.mixed == pytest.approx(float(change), rel=1e-5)


def test_estimate_of_the_unseen_is_unbiased():
    # All 4^3 groups of 3 draws, with both outcomes of each rollout: E[U_correct] = sum p^2 q (1 - p)^2.
    p, q, n = [0.5, 0.25, 0.125, 0.125], [0.9, 0.2, 0.5, 0.0], 3
    expected = {True: 0.0, False: 0.0}
    for draws in product(range(4), repeat=n):
        for outcome in product([True, False], repeat=n):
            chance = math.prod(p[v] * (q[v] if good else 1 - q[v]) for v, good in zip(draws, outcome, strict=True))
            for side, moment in unseen_moments(draws, p, outcome).items():
                expected[side] += chance * moment
    assert expected[True] == close(sum(x * x * good * (1 - x) ** 2 for x, good in zip(p, q, strict=True)))
    assert expected[False] == close(sum(x * x * (1 - good) * (1 - x) ** 2 for x, good in zip(p, q, strict=True)))


def unseen_moments(draws, p, outcome):
    """U_correct and U_wrong as `of_group` defines them, checked against its unsampled term."""
    lone = [i for i, v in enumerate(draws) if draws.count(v) == 1]
    moments = {side: sum(p[draws[i]] for i in lone if outcome[i] is side) / len(draws) for side in (True, False)}
    found = of_group([(v,) for v in draws], [(math.log(p[v]),) for v in draws], outcome).terms
    expected = found.s_r * (found.q_pos * moments[False] - (1 - found.q_pos) * moments[True])
    assert found.unsampled == close(expected)
    return moments


def test_of_group_agrees_with_a_walk_over_all_prefixes():
    rng = Random(4)
    for _ in range(30):
        ids = [tuple(rng.choices(range(3), [6, 2, 1], k=rng.randrange(7))) for _ in range(24)]
        logp = [[rng.choice([-0.1, -0.5, -2.0]) if rng.random() > 0.05 else NAN for _ in row] for row in ids]
        passed = [rng.choice([True, False, False, None]) for _ in ids]
        found = of_group(ids, logp, passed)
        states = walk(ids, logp, passed)
        counts = [n for n, _, _ in states]
        assert found.num_states == len(states)
        num_tokens = sum(len(row) for row, judged in zip(ids, passed, strict=True) if judged is not None)
        assert found.shared_frac == close(sum(counts) / num_tokens)
        assert found.terms.q_pos == close(sum(n * q for n, q, _ in states) / sum(counts))
        assert found.terms.s_r == close(sum(n * s for n, _, s in states) / sum(counts))


def walk(ids, logp, passed):
    """(n, Q, S) of every shared prefix, the slow way."""
    at = {}
    for row, values, outcome in zip(ids, logp, passed, strict=True):
        for t, value in enumerate(values):
            if outcome is None or math.isnan(value):
                break
            at.setdefault(row[:t], []).append((row[t], math.exp(value), outcome))
    states = []
    for visits in at.values():
        n, q = len(visits), sum(outcome for *_, outcome in visits) / len(visits)
        alike = [[visit for visit in visits if visit[0] == token] for token in {token for token, *_ in visits}]
        parts = [(sum(p for _, p, _ in v) / len(v), sum(good for *_, good in v) / len(v)) for v in alike]
        s = sum((1 - q) * p * good - q * p * (1 - good) for p, good in parts)
        if n >= 2:
            states.append((n, q, s))
    return states


def test_a_rollout_ends_where_the_policy_did_not_write():
    whole = of_group([(1, 2), (1, 2)], [(-0.5, -0.5), (-0.5, -0.5)], [True, False])
    cut = of_group([(1, 2, 7, 7), (1, 2, 7, 7)], [(-0.5, -0.5, NAN, -1.0), (-0.5, -0.5, -1.0, -1.0)], [True, False])
    assert cut.terms == whole.terms
    assert (whole.num_states, cut.num_states, cut.shared_frac) == (2, 2, 0.5)


def test_a_rollout_that_ended_does_not_tie_together_what_follows():
    # The second ends where the third goes on: after 2 there is one rollout, and no state.
    found = of_group([(1, 1), (2,), (2, 3)], [(-1.0, -1.0), (-1.0,), (-1.0, -1.0)], [True, False, True])
    assert (found.num_states, found.shared_frac) == (1, 3 / 5)


@pytest.mark.parametrize("passed", [[], [True], [None, True, None], [None, None]])
def test_without_two_judged_rollouts_there_is_no_state(passed):
    found = of_group([(1, 2)] * len(passed), [(-0.1, -0.2)] * len(passed), passed)
    assert found.num_states == 0
    assert math.isnan(found.terms.total)


def test_of_group_takes_milliseconds():
    # 512 rollouts of 200 tokens, of which 150 are shared by all and the next few by some; median of 5 on one thread.
    rng = Random(0)
    ids = [(*range(150), *rng.choices(range(8), k=50)) for _ in range(512)]
    logp, passed, seconds = [[-0.3] * 200] * 512, [rng.random() < 0.5 for _ in ids], []
    for _ in range(5):
        start = time.perf_counter()
        of_group(ids, logp, passed)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[2] < 0.25  # on a machine with other things to do
