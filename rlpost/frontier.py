"""What the policy has never solved: the record that tells a new capability from a sharper one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.types import Outcome


class Frontier:
    """How often each task was tried without any success so far, and how it went when it was last tried.

    >>> frontier = Frontier()
    >>> frontier.observe([Outcome("a", (0.0,) * 8, 0, (False,) * 8)]), frontier.failures
    (0, {'a': 8})
    >>> frontier.observe([Outcome("a", (1.0, 0.0), 1, (True, False))]), frontier.failures
    (1, {'a': 0})
    >>> frontier.figures()["capability/gain"]
    0.5
    """

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}
        """Answers before the first success; 0 once there was one."""
        self.rates: dict[str, float] = {}
        """Share of the answers that passed when the task was last tried."""
        self._num_solved = 0
        self._changes: list[tuple[bool, float, float]] = []
        """Of this step's tasks that were tried before: whether solved before, pass rate before, pass rate now."""
        self._before: dict[str, tuple[int | None, float | None]] = {}
        """What stood there at `begin`, of the tasks that were tried since."""
        self._num_before = 0

    def begin(self) -> None:
        """Start a step, which `undo` can take back; a copy of the record would cost more than most steps change."""
        self._before, self._num_before, self._changes = {}, self._num_solved, []

    def undo(self) -> None:
        """Forget what was observed since `begin`."""
        for key, (failures, rate) in self._before.items():
            _put(self.failures, key, failures)
            _put(self.rates, key, rate)
        self._before, self._num_solved, self._changes = {}, self._num_before, []

    def observe(self, outcomes: Sequence[Outcome]) -> int:
        """Take note of what the policy did without help; how many tasks it solved at last."""
        newly_solved = 0
        for outcome in outcomes:
            before = self.failures.get(outcome.key)
            self._before.setdefault(outcome.key, (before, self.rates.get(outcome.key)))
            judged = [passed for passed in outcome.passed if passed is not None]
            if judged:
                rate = sum(judged) / len(judged)
                if outcome.key in self.rates:
                    self._changes.append((before == 0, self.rates[outcome.key], rate))
                self.rates[outcome.key] = rate
            if any(outcome.passed):
                newly_solved += bool(before)
                self._num_solved += before != 0
                self.failures[outcome.key] = 0
            elif before != 0 and outcome.passed:
                self.failures[outcome.key] = (before or 0) + len(outcome.passed)
        return newly_solved

    def figures(self) -> dict[str, float]:
        """How this step's tasks changed since they were last tried: reach that is new, against success made surer."""
        changes, self._changes = self._changes, []
        shown = {"capability/revisited": float(len(changes))}
        if self.failures:
            shown["capability/ever_solved_frac"] = self._num_solved / len(self.failures)
        if changes:
            num = len(changes)
            shown["capability/gain"] = sum(now for solved, _, now in changes if not solved) / num
            shown["capability/sharpening"] = sum(now - then for solved, then, now in changes if solved) / num
            shown["capability/lost_frac"] = sum(solved and not now for solved, _, now in changes) / num
        return shown

    def state_dict(self) -> dict[str, Any]:
        """The record."""
        return {"failures": dict(self.failures), "rates": dict(self.rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.failures, self.rates = dict(state["failures"]), dict(state["rates"])
        self._num_solved = sum(count == 0 for count in self.failures.values())
        self.begin()


def _put(record: dict[str, Any], key: str, value: Any) -> None:
    """Set what stood there, where something did."""
    if value is None:
        record.pop(key, None)
    else:
        record[key] = value
