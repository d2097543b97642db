import signal
import time

import pytest

from rlpost.deadline import TimeOver, deadline


def test_a_block_that_takes_too_long_is_ended_and_a_quick_one_is_not():
    with deadline(30), deadline(None):
        pass
    started = time.monotonic()
    with pytest.raises(TimeOver), deadline(0.1):
        time.sleep(30)
    assert time.monotonic() - started < 20
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 20  # the alarm of pytest-timeout has gone on


def test_a_block_that_swallows_its_alarm_gets_another():
    with pytest.raises(TimeOver), deadline(0.1):
        try:
            time.sleep(30)
        except TimeOver:
            while True:
                pass


def test_an_alarm_that_was_running_goes_on_running():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with deadline(20):
            time.sleep(0.5)
        time.sleep(0.2)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
