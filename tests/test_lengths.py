"""Rewards of length, at the points where they change."""

import pytest

from rlpost.lengths import cosine_length, kimi_length, soft_overlong, switched_on, warmed_up


def test_soft_overlong_is_the_published_table():
    # DAPO: 20,480 tokens, the last 4,096 of them the buffer.
    table = {0: 0.0, 16_384: 0.0, 18_432: -0.5, 20_480: -1.0, 30_000: -1.0}
    assert {n: soft_overlong(n, limit=20_480, buffer=4_096) for n in table} == table


@pytest.mark.parametrize("length", [0, 79, 80, 90, 100, 150])
def test_soft_overlong_is_scalerl_s_length_penalty(length):
    other = min(max((100 - length) / 20 - 1, -1), 0)
    assert soft_overlong(length, limit=100, buffer=20) == pytest.approx(other)


def test_kimi_length_rewards_short_correct_answers_and_never_a_wrong_one():
    assert kimi_length([10, 15, 30, 10, 30], [True, True, True, False, False]) == [0.5, 0.25, -0.5, 0.0, -0.5]
    assert kimi_length([7, 7], [True, False]) == [0.0, 0.0]


def test_warm_up_is_a_step():
    assert [warmed_up(0.2, step=step, warmup_steps=2) for step in range(4)] == [0, 0, 0.2, 0.2]


def test_cosine_length_falls_from_high_to_low_and_stays():
    found = [cosine_length(n, limit=300, low=-0.5, high=0.5) for n in (0, 100, 150, 300, 900)]
    assert found == pytest.approx([0.5, 0.25, 0.0, -0.5, -0.5])


def test_schedule_cycles():
    assert [step for step in range(1200) if switched_on(step, on=100, off=500)] == [*range(100), *range(600, 700)]
