import pytest

from rlpost.clock import Clock
from rlpost.metrics import metric_info


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def test_clock_charges_every_moment_to_one_phase():
    time = Time()
    clock = Clock(now=time)
    time.advance(1)
    with clock("train"):
        time.advance(2)
        with clock("sync"):
            time.advance(4)
        with clock("train"):
            time.advance(8)
        time.advance(16)
    time.advance(32)
    with clock("evaluate"):
        time.advance(64)
    assert clock.lap() == {
        "time/other_s": 33.0,
        "time/train_s": 26.0,
        "time/sync_s": 4.0,
        "time/evaluate_s": 64.0,
        "time/step_s": 63.0,
    }
    assert sum(clock.total.values()) == time.now
    assert clock.seconds == {}


def test_clock_charges_a_phase_that_raises():
    time = Time()
    clock = Clock(now=time)
    with pytest.raises(KeyError), clock("train"):
        time.advance(2)
        raise KeyError
    time.advance(1)
    clock.lap()
    assert clock.total == {"train": 2.0, "other": 1.0}


def test_clock_resumes_exactly():
    time = Time()
    first, resumed = Clock(now=time), Clock(now=time)
    with first("train"):
        time.advance(2)
    first.lap()
    resumed.load_state_dict(first.state_dict())
    resumed.lap()
    for clock in (first, resumed):
        clock.lap()
        with clock("train"):
            time.advance(3)
        clock.lap()
    assert resumed.total["train"] == first.total["train"] == 5.0


def test_clock_keeps_the_peak_of_each_phase_of_a_step_and_of_the_run():
    use = iter([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 6.0, 0.5])
    clock = Clock(gauge=lambda: next(use))
    with clock("train"), clock("sync"):
        pass
    lap = {name: gib for name, gib in clock.lap().items() if name.startswith("memory/")}
    of_phase = {"memory/peak_gib/other": 5.0, "memory/peak_gib/train": 2.0, "memory/peak_gib/sync": 4.0}
    assert lap == {"memory/peak_gib": 5.0, **of_phase}
    with clock("train"):
        pass
    assert clock.lap()["memory/peak_gib/train"] == 6.0
    assert clock.total_peak_gib == {"other": 9.0, "train": 6.0, "sync": 4.0}
    resumed = Clock()
    resumed.load_state_dict(clock.state_dict())
    assert resumed.total_peak_gib == clock.total_peak_gib
    assert metric_info("memory/peak_gib/train").reduction == "max"


def test_clock_waits_for_the_device_at_each_change_of_phase():
    waits = []
    clock = Clock(synchronise=lambda: waits.append(1))
    with clock("train"):
        pass
    clock.lap()
    assert len(waits) == 3
