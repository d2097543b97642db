"""What the policy has never solved: the record that tells a new capability from a sharper one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.types import Outcome


class Frontier:
    """How often each task was tried without any success so far; the same on every rank.

    >>> frontier = Frontier()
    >>> frontier.observe([Outcome("a", (0.0,) * 8, 0, (False,) * 8)]), frontier.failures
    (0, {'a': 8})
    >>> frontier.observe([Outcome("a", (1.0, 0.0), 1, (True, False))]), frontier.failures
    (1, {'a': 0})
    """

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}
        """Answers before the first success; 0 once there was one."""
        self._before: dict[str, int | None] = {}
        """What stood there at `begin`, of the tasks that were tried since."""

    def begin(self) -> None:
        """Start a step, which `undo` can take back; a copy of the record would cost more than most steps change."""
        self._before = {}

    def undo(self) -> None:
        """Forget what was observed since `begin`."""
        for key, failures in self._before.items():
            if failures is None:
                self.failures.pop(key, None)
            else:
                self.failures[key] = failures
        self._before = {}

    def observe(self, outcomes: Sequence[Outcome]) -> int:
        """Take note of what the policy did without help; how many tasks it solved at last."""
        newly_solved = 0
        for outcome in outcomes:
            before = self.failures.get(outcome.key)
            self._before.setdefault(outcome.key, before)
            if any(outcome.passed):
                newly_solved += bool(before)
                self.failures[outcome.key] = 0
            elif before != 0 and outcome.passed:
                self.failures[outcome.key] = (before or 0) + len(outcome.passed)
        return newly_solved

    def state_dict(self) -> dict[str, Any]:
        """The record."""
        return {"failures": dict(self.failures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.failures, self._before = dict(state["failures"]), {}
