"""When the reference policy becomes a copy of the trained one: on a schedule, on a KL spike, when validation stalls.

ProRL, arXiv:2505.24864, which also clears the optimizer; ProRLv2 keeps it. A pure state machine: whoever runs it saves
the state, copies the weights and clears what is to be cleared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Reason = Literal["schedule", "kl_spike", "stalled"]


@dataclass(frozen=True, slots=True)
class ResetRule:
    """When a reset is due. Every field that is 0 switches its trigger off.

    >>> ResetRule(every=200, kl_spike=0.5).patience
    0
    """

    every: int = 0
    """Steps since the last reset; 200-500 in ProRLv2."""
    kl_spike: float = 0.0
    """Mean KL to the reference, in nats a token, above which a reset is due."""
    patience: int = 0
    """Evaluations in a row without a new best."""
    min_gap: int = 1
    """Steps that must lie between two resets."""


@dataclass(frozen=True, slots=True)
class ResetState:
    """What a rule remembers.

    >>> ResetState().last_reset
    0
    """

    last_reset: int = 0
    best: float = -math.inf
    stale: int = 0
    """Evaluations since `best`."""


def observe_validation(state: ResetState, score: float) -> ResetState:
    """The state after an evaluation; higher is better, and NaN is no improvement."""
    if score > state.best:
        return replace(state, best=score, stale=0)
    return replace(state, stale=state.stale + 1)


def advance(rule: ResetRule, state: ResetState, *, step: int, kl_mean: float) -> tuple[ResetState, Reason | None]:
    """The state after `step` whole steps, and why the reference is to be reset now, or None.

    >>> advance(ResetRule(every=3), ResetState(), step=3, kl_mean=0.0)[1]
    'schedule'
    """
    since = step - state.last_reset
    reason: Reason | None = None
    if since < max(rule.min_gap, 1):
        return state, None
    if rule.kl_spike and kl_mean > rule.kl_spike:
        reason = "kl_spike"
    elif rule.every and since >= rule.every:
        reason = "schedule"
    elif rule.patience and state.stale >= rule.patience:
        reason = "stalled"
    return (replace(state, last_reset=step, stale=0), reason) if reason else (state, None)
