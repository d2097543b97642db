"""What is newly solved against what is solved more surely."""

import json

import pytest

from rlpost.frontier import Frontier
from rlpost.types import Outcome


def outcome(key, *passed):
    return Outcome(key, tuple(map(float, map(bool, passed))), 0, passed)


def test_gain_sharpening_and_loss_match_a_hand_table():
    frontier = Frontier()
    first = [outcome("a", False, False), outcome("b", True, False), outcome("c", True, True), outcome("d", None, None)]
    assert frontier.observe(first) == 0
    assert frontier.figures() == {"capability/revisited": 0, "capability/ever_solved_frac": 0.5}
    again = [outcome("a", True, False), outcome("b", True, True), outcome("c", False, None), outcome("e", True)]
    assert frontier.observe(again) == 1
    assert frontier.figures() == {
        "capability/revisited": 3,
        "capability/gain": pytest.approx(0.5 / 3),  # a
        "capability/sharpening": pytest.approx((0.5 - 1.0) / 3),  # b rose, c fell
        "capability/lost_frac": pytest.approx(1 / 3),  # c
        "capability/ever_solved_frac": 4 / 5,
    }
    assert frontier.figures() == {"capability/revisited": 0, "capability/ever_solved_frac": 4 / 5}


def test_frontier_resumes_exactly():
    frontier, resumed = Frontier(), Frontier()
    frontier.observe([outcome("a", False), outcome("b", True)])
    frontier.figures()
    resumed.load_state_dict(json.loads(json.dumps(frontier.state_dict())))
    for one in (frontier, resumed):
        one.observe([outcome("a", True), outcome("b", False)])
    assert resumed.figures() == frontier.figures() and resumed.state_dict() == frontier.state_dict()


def test_a_step_that_is_taken_back_leaves_no_trace():
    frontier = Frontier()
    frontier.observe([outcome("a", False, False), outcome("b", True)])
    frontier.figures()
    before = frontier.state_dict()
    frontier.begin()
    assert frontier.observe([outcome("a", False), outcome("c", False), outcome("d", True)]) == 0
    assert frontier.observe([outcome("a", True), outcome("c", True), outcome("b", False)]) == 2
    for _ in range(2):
        frontier.undo()
        assert frontier.state_dict() == before
        assert frontier.figures() == {"capability/revisited": 0, "capability/ever_solved_frac": 0.5}


def test_only_the_step_since_begin_is_taken_back():
    frontier = Frontier()
    frontier.begin()
    frontier.observe([outcome("a", False)])
    frontier.begin()
    frontier.observe([outcome("a", False, False)])
    frontier.undo()
    assert frontier.state_dict() == {"failures": {"a": 1}, "rates": {"a": 0.0}}
    frontier.load_state_dict({"failures": {"z": 3}, "rates": {}})
    frontier.undo()
    assert frontier.failures == {"z": 3}
