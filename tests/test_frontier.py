from rlpost.frontier import Frontier
from rlpost.types import Outcome


def tried(key, *passed):
    return Outcome(key, tuple(map(float, passed)), 0, passed)


def test_a_step_that_is_taken_back_leaves_no_trace():
    frontier = Frontier()
    frontier.observe([tried("a", False, False), tried("b", True)])
    before = list(frontier.state_dict()["failures"].items())
    frontier.begin()
    assert frontier.observe([tried("a", False), tried("c", False), tried("d", True)]) == 0
    assert frontier.observe([tried("a", True), tried("c", True), tried("b", False)]) == 2
    frontier.undo()
    assert list(frontier.failures.items()) == before
    frontier.undo()
    assert list(frontier.failures.items()) == before


def test_only_the_step_since_begin_is_taken_back():
    frontier = Frontier()
    frontier.begin()
    frontier.observe([tried("a", False)])
    frontier.begin()
    frontier.observe([tried("a", False, False)])
    frontier.undo()
    assert frontier.failures == {"a": 1}
    frontier.load_state_dict({"failures": {"z": 3}})
    frontier.undo()
    assert frontier.failures == {"z": 3}
