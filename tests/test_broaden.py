import math

import pytest
from groups import group

from rlpost.errors import RunError
from rlpost.explore.broaden import Broaden, expected_spread


def grown(broaden, groups, judge, rounds=100):
    """Ask until nobody wants more; `judge(group, i)` says whether answer i passes. The requests of each round."""
    asked = []
    for _ in range(rounds):
        broaden.begin(0, groups)
        requests = [(one, request) for one in groups for request in broaden.more(one)]
        if not requests:
            return asked
        asked.append({one.id: request.n for one, request in requests})
        for one, request in requests:
            assert request.seed == one.seed + len(one.rollouts)
            start = len(one.rollouts)
            one.rollouts += group(*(judge(one, start + i) for i in range(request.n)), id=one.id).rollouts
    raise AssertionError("it never ends")


def test_a_group_grows_in_chunks_to_its_width():
    one = group(True, False)
    assert grown(Broaden(seed=0, width=11, chunk=4), [one], lambda *_: True) == [{0: 4}, {0: 4}, {0: 1}]
    assert len(one.rollouts) == 11


def test_wald_ends_what_is_hopeless_and_what_is_as_good_as_solved():
    # log((1 - .2) / (1 - .01)) = -.2131 a failure; log(.05 / .95) = -2.944: 14 failures in a row decide.
    assert math.ceil(math.log(0.05 / 0.95) / math.log(0.8 / 0.99)) == 14
    broaden = Broaden(seed=0, width=40, chunk=2, hopeless=0.01, worthwhile=0.2)
    assert not broaden.decided(group(*[False] * 13)) and broaden.decided(group(*[False] * 14))
    assert not broaden.decided(group(*[True] * 13)) and broaden.decided(group(*[True] * 14))
    # A success is worth log(.2 / .01) = 2.996, as much as 14.06 failures: with one, 28 failures decide, 27 do not.
    assert not broaden.decided(group(True, *[False] * 27)) and broaden.decided(group(True, *[False] * 28))
    assert not broaden.decided(group(*[None] * 30))


def test_the_sequential_test_gives_up_what_is_worthwhile_as_seldom_as_it_says():
    """Exactly, by the distribution of the walk: at p = worthwhile, no more than `error` end as hopeless."""
    broaden = Broaden(seed=0, width=200, chunk=1, hopeless=0.01, worthwhile=0.1, error=0.05)
    alive, given_up = {0: 1.0}, 0.0
    for n in range(1, 201):
        after = {}
        for successes, chance in alive.items():
            for hit, p in ((1, 0.1), (0, 0.9)):
                after[successes + hit] = after.get(successes + hit, 0.0) + chance * p
        alive = {}
        for successes, chance in after.items():
            if broaden._accepts(successes, n):
                given_up += chance
            else:
                alive[successes] = chance
    assert 0.02 < given_up <= 0.05 / 0.95 + 1e-9  # Wald: at most error / (1 - error)


def test_what_hopeless_groups_save_goes_where_most_spread_is_expected():
    broaden = Broaden(seed=0, width=20, chunk=4, max_width=30, hopeless=0.01, worthwhile=0.2)
    groups = [group(False, False, id=0), group(True, False, id=1), group(False, True, id=2)]

    def judge(one, i):
        return one.id != 0 and (i % 2 == 0 if one.id == 1 else i % 5 == 0)

    grown(broaden, groups, judge)
    sizes = [len(one.rollouts) for one in groups]
    assert sizes[0] == 14  # decided, 6 saved
    assert sizes[1:] == [24, 22]  # half solved: it gets the first chunk of them, and the next best the rest
    assert sum(sizes) == 60
    for one in groups:
        broaden.sample(one)
    assert broaden.metrics() == {"width_mean": 20.0, "decided_frac": pytest.approx(1 / 3)}
    assert broaden.metrics() == {}


def test_expected_spread_is_the_posterior_mean_under_a_uniform_prior():
    # 3 of 4: Beta(4, 2) has E[p(1-p)] = 4 * 2 / (6 * 7)
    assert expected_spread(group(True, True, True, False)) == pytest.approx(8 / 42)


@pytest.mark.parametrize("rule", ["balanced", "spread", "random"])
def test_a_sample_is_trained_and_the_others_count_in_the_statistics_alone(rule):
    broaden = Broaden(seed=3, width=16, train=6, rule=rule)
    one = group(*[True] * 2, *[False] * 14)
    broaden.sample(one)
    kept = [rollout for rollout in one.rollouts if rollout.inclusion]
    assert len(one.rollouts) == 16 and len(kept) == 6
    assert sum(rollout.passed for rollout in kept) == 2 or rule == "random"
    if rule == "balanced":
        assert [rollout.inclusion for rollout in kept] == [1, 1, *[pytest.approx(4 / 14)] * 4]
    again = group(*[True] * 2, *[False] * 14)
    Broaden(seed=3, width=16, train=6, rule=rule).sample(again)
    assert [a.inclusion for a in again.rollouts] == [b.inclusion for b in one.rollouts]


def test_unjudged_rollouts_are_never_sampled():
    for seed in range(20):
        one = group(True, False, False, None, None)
        Broaden(seed=seed, width=5, train=2).sample(one)
        first, *failed = [rollout.inclusion for rollout in one.rollouts if rollout.passed is not None]
        assert first == 1 and sorted(failed) == [0, 0.5]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"width": 1}, "broaden.width must be >= 2"),
        ({"chunk": 0}, "broaden.chunk must be >= 1"),
        ({"width": 8, "max_width": 4}, "max_width must be 0, or >= width=8"),
        ({"hopeless": 0.5}, "hopeless must be >= 0 and less than worthwhile"),
        ({"rule": "best"}, "rule must be one of balanced, spread, random"),
        ({"train": 1}, "train must be 0"),
    ],
)
def test_parameters_that_make_no_sense_are_named(asked, words):
    with pytest.raises(RunError, match=words):
        Broaden(seed=0, **asked)
