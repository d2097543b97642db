"""When the reference policy is reset."""

from math import nan

from rlpost.reference import ResetRule, ResetState, advance, observe_validation


def resets(rule, kls, scores=None):
    """(step, reason) of each reset in a run with these KLs after steps 1, 2, ..."""
    state, found = ResetState(), []
    for step, kl_mean in enumerate(kls, start=1):
        if scores is not None:
            state = observe_validation(state, scores[step - 1])
        state, reason = advance(rule, state, step=step, kl_mean=kl_mean)
        if reason:
            found.append((step, reason))
    return found


def test_schedule_counts_from_the_last_reset():
    assert resets(ResetRule(every=3), [0.0] * 7) == [(3, "schedule"), (6, "schedule")]


def test_a_kl_spike_resets_early_and_restarts_the_schedule():
    kls = [0.1, 0.9, 0.1, 0.1, 0.1]
    assert resets(ResetRule(every=3, kl_spike=0.5), kls) == [(2, "kl_spike"), (5, "schedule")]


def test_min_gap_keeps_a_lasting_spike_from_resetting_every_step():
    assert resets(ResetRule(kl_spike=0.5, min_gap=3), [0.9] * 7) == [(3, "kl_spike"), (6, "kl_spike")]


def test_stalled_validation_resets_after_patience_evaluations_without_a_new_best():
    scores = [0.1, 0.3, 0.3, 0.2, nan, 0.4, 0.1]
    assert resets(ResetRule(patience=2), [0.0] * 7, scores) == [(4, "stalled")]


def test_a_rule_of_zeros_never_resets_and_nan_is_no_spike():
    assert resets(ResetRule(), [9.0] * 4) == []
    assert resets(ResetRule(kl_spike=0.5), [nan] * 4) == []


def test_state_is_a_value_so_that_a_resumed_run_resets_at_the_same_steps():
    rule, state = ResetRule(every=3, patience=2), ResetState()
    for step in (1, 2):
        state = observe_validation(state, 0.5)
        state, _ = advance(rule, state, step=step, kl_mean=0.0)
    copy = ResetState(last_reset=state.last_reset, best=state.best, stale=state.stale)
    assert advance(rule, copy, step=3, kl_mean=0.0) == advance(rule, state, step=3, kl_mean=0.0)
