"""The sections `preempt`, `failure` and `watchdog` of a recipe: how a run lives on a cluster that kills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Preempt:
    """When a run leaves of itself, and how fast it must."""

    after_s: float | None = None
    """Save and leave with exit code 75 after so many seconds from this start, ahead of a scheduler's limit; null: only
    on SIGTERM and SIGUSR1."""
    budget_s: float = 240.0
    """Seconds from being asked to leave to the exit. What is not saved by then is not saved: the checkpoint before
    stands. Keep it below what the launcher waits before SIGKILL."""


@dataclass
class Failure:
    """What becomes of a step in which something fails."""

    reward: Literal["raise", "drop", "zero"] = "raise"
    """What becomes of a rollout on which a reward took too long, died or raised, unless its own `on_error` says
    otherwise. `raise`: the run ends, its state saved. `drop`: it has no reward and is in no baseline. `zero`: 0. All
    are counted by kind, in `reward/endings/<name>/<ending>`."""
    reward_s: float | None = 60.0
    """Longest time of a reward for one rollout, unless its own `timeout_s` says otherwise; null: no bound."""
    reward_memory_gib: float | None = 8.0
    """Most memory that a process with rewards may use; null: no bound."""
    reward_workers: int | None = None
    """Processes with rewards, of each rank; null: a core each, at most 8."""
    gradients: int = 3
    """A gradient that is not finite is not stepped with, and counted; so many in a row end the run, state saved."""
    empty_steps: int = 100
    """Steps in a row that found no group to train on, after which the run ends with its state saved; 0: never."""


@dataclass
class Watchdog:
    """What is done about a rank that does not get on: no rollout scored, no engine step, no micro-batch, no phase."""

    report_s: float = 300.0
    """After so many seconds the phase of every rank is printed, and again each time that doubles."""
    stop_s: float | None = None
    """After so many the process prints its stacks and ends; null: never (a collective gives up after 30 minutes)."""
