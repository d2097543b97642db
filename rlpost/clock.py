"""The clock of a run: wall seconds and peak memory by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlpost.peak import Gauge, fullest

OUTSIDE_STEP = frozenset({"setup", "sft", "evaluate", "checkpoint"})
"""Phases of the clock that belong to the run and not to its steps."""


class Clock:
    """Wall seconds by phase: every moment belongs to exactly one phase, so that phases add up to the step.

    `with clock("generate"):` charges its block to that phase, less what nested phases take; time outside of any phase
    is `other`. On an accelerator `synchronise` waits for its queue, or one phase would pay for another's kernels.
    """

    def __init__(
        self,
        synchronise: Callable[[], Any] | None = None,
        now: Callable[[], float] = time.perf_counter,
        gauge: Gauge | None = None,
    ) -> None:
        self.gauge = gauge
        self.peak_gib: dict[str, float] = {}
        """Largest memory in use in each phase of this step so far, as the gauge says."""
        self.total_peak_gib: dict[str, float] = {}
        """The same of the run, of finished steps."""
        self.seconds: dict[str, float] = {}
        """Seconds of this step so far."""
        self.total: dict[str, float] = {}
        """Seconds of the run, of finished steps."""
        self._synchronise = synchronise
        self._now = now
        self.changes = 0
        """Phases begun and ended so far: a sign of life."""
        self._phases = ["other"]
        self._since = now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the block to `phase`."""
        self._charge()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()

    @property
    def phase(self) -> str:
        """The phase that the present moment is charged to."""
        return self._phases[-1]

    def lap(self) -> dict[str, float]:
        """End a step: its seconds as metrics `time/<phase>_s`, and `time/step_s` without the phases outside a step.

        Of memory, `memory/peak_gib/<phase>`, and the largest of all phases as `memory/peak_gib`.
        """
        self._charge()
        for phase, seconds in self.seconds.items():
            self.total[phase] = self.total.get(phase, 0.0) + seconds
        lap = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        lap["time/step_s"] = sum(seconds for phase, seconds in self.seconds.items() if phase not in OUTSIDE_STEP)
        self.total_peak_gib = fullest([self.total_peak_gib, self.peak_gib])
        lap |= {f"memory/peak_gib/{phase}": gib for phase, gib in self.peak_gib.items()}
        if self.peak_gib:
            lap["memory/peak_gib"] = max(self.peak_gib.values())
        self.seconds, self.peak_gib = {}, {}
        return lap

    def state_dict(self) -> dict[str, Any]:
        """The run's seconds and peaks up to the last lap."""
        return {"total": dict(self.total), "peak_gib": dict(self.total_peak_gib)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a run's earlier part."""
        self.total = dict(state["total"])
        self.total_peak_gib = dict(state["peak_gib"])

    def _charge(self) -> None:
        if self._synchronise is not None:
            self._synchronise()
        if self.gauge is not None:
            self.peak_gib = fullest([self.peak_gib, {self._phases[-1]: self.gauge()}])
        self.changes += 1
        now = self._now()
        self.seconds[self._phases[-1]] = self.seconds.get(self._phases[-1], 0.0) + now - self._since
        self._since = now
