"""Being asked to leave: the flag, how ranks agree on it, and real runs that are signalled in every phase."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lab import ROOT, logged, make_lab, weights

from rlpost.errors import Preempted, RunError, SharedError
from rlpost.preempt import SIGNALS, Preemption
from rlpost.world import World

PHASES = [
    "setup:1:SIGTERM",
    "sync:4:SIGTERM",
    "generate:2:SIGTERM",
    "reward:5:SIGUSR1",
    "score:3:SIGTERM",
    "train:2:SIGTERM",
    "evaluate:3:SIGTERM",
    "checkpoint:1:SIGTERM",
    "generate:3:SIGTERM,checkpoint:1:SIGTERM",  # the second signal in the save that the first has led to
]


class Ranks:
    """One rank of several, of which the others send what is given."""

    size = 2

    def __init__(self, *others) -> None:
        self.others = others

    def all_gather_object(self, item):
        return [item, *self.others]

    def max(self, value):
        return max(value, *self.others)

    together = World.together


def test_the_first_to_ask_is_remembered_and_every_later_one_changes_nothing() -> None:
    asked = Preemption()
    asked.poll()
    with asked.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        since = asked.since
        os.kill(os.getpid(), signal.SIGTERM)
        assert (asked.why, asked.since) == ("SIGUSR1", since)
        with pytest.raises(Preempted, match="asked to leave by SIGUSR1"):
            asked.poll()
    try:
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2  # on its way out
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def test_signals_are_as_before_where_nobody_asked() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_time_limit_counts_seconds_and_no_clock_that_jumps(monkeypatch) -> None:
    now = [100.0]
    asked = Preemption(lambda: now[0])
    asked.limit(10)
    monkeypatch.setattr(time, "time", lambda: 1e12)  # a day ahead, or thirty thousand years
    now[0] = 109.9
    assert not asked.is_due()
    now[0] = 110.0
    assert asked.is_due() and "preempt.after_s" in str(asked.why)
    asked.reset()
    assert not asked.is_due()


def test_all_ranks_leave_when_one_is_asked() -> None:
    asked = Preemption()
    assert not asked.agree(Ranks(0))
    with pytest.raises(Preempted, match="another rank"):
        asked.check(Ranks(1))


def test_what_is_broken_on_one_rank_comes_before_a_leave_on_another() -> None:
    assert Ranks(None).together(lambda: 3) == 3
    with pytest.raises(Preempted, match="SIGTERM"):
        Ranks((True, "asked to leave by SIGTERM")).together(lambda: 3)

    def leave() -> None:
        raise Preempted("asked to leave")

    with pytest.raises(SharedError, match="the reward is broken") as raised:
        Ranks((False, "the reward is broken")).together(leave)
    assert not isinstance(raised.value, Preempted)
    assert isinstance(raised.value, RunError)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_signalled_in_any_phase_resumes_to_the_same_figures_and_weights(tmp_path) -> None:
    lab = make_lab(tmp_path)
    done = started([str(ROOT / "tests/interrupted.py"), str(lab), "run", "", *PHASES], lab)
    codes = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("codes: ")]
    assert codes == [[0], *[[75, 0]] * len(PHASES)], done.stdout[-3000:] + done.stderr[-3000:]
    for i, phase in enumerate(PHASES, 1):
        assert logged(lab, f"run-{i}") == logged(lab, "run-0"), phase
        ours, theirs = weights(lab, f"run-{i}", 4), weights(lab, "run-0", 4)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), phase


def started(arguments: list[str], lab: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    joined = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {key: value for key, value in os.environ.items() if key not in joined}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=lab / "elsewhere",
        env=own,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
