"""The watchdog: what it says of stuck ranks, and how it ends those that cannot end themselves; with real processes."""

from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lab import ROOT, logged, make_lab
from test_preempt import started

from rlpost.clock import Clock
from rlpost.cluster_recipe import Preempt
from rlpost.cluster_recipe import Watchdog as Limits
from rlpost.errors import RunError
from rlpost.preempt import PREEMPTED, Preemption
from rlpost.watchdog import GONE, Watchdog

ALONE = SimpleNamespace(rank=0, size=1)
ACCIDENTS = """
    import os
    import signal
    import subprocess

    calls = 0

    def happens(rollout) -> float:
        '''Nothing, but for the accident of the test: RANK:COUNT:SIGNAL, at the COUNT-th rollout that is judged.'''
        global calls
        calls += 1
        rank, count, name = os.environ["ACCIDENT"].split(":")
        if (os.environ["RANK"], calls) == (rank, int(count)):
            if name == "SIGSTOP":
                subprocess.Popen(["sh", "-c", f"sleep 45; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), getattr(signal, name))
        return 0.0
"""
TWO_RANKS = ["-m", "rlpost.torchrun", "--standalone", "--nproc-per-node=2", "-m", "rlpost", "train"]


def watchdog(leave: Preemption, clock: Clock, **limits: float) -> Watchdog:
    return Watchdog(SimpleNamespace(watchdog=Limits(**limits), preempt=Preempt()), ALONE, clock, leave)


def test_a_phase_without_progress_is_named_and_one_with_progress_is_not(capfd) -> None:
    leave, clock = Preemption(), Clock()
    with watchdog(leave, clock, report_s=1.5), clock("checkpoint"):
        for _ in range(30):
            leave.get_on()
            time.sleep(0.1)
        assert capfd.readouterr().err == ""
        time.sleep(4)  # a disk that takes its time
    said = capfd.readouterr().err
    assert re.search(r"watchdog: no progress for \d+ s\n  rank 0 \(\S+:\d+\): \d+ s in phase checkpoint", said)


def in_a_process(body: str, tmp_path: Path, **limits: float):
    (tmp_path / "elsewhere").mkdir()
    code = f"""
    import os, signal, threading, time
    from types import SimpleNamespace
    from rlpost.cluster_recipe import Preempt, Watchdog as Limits
    from rlpost.clock import Clock
    from rlpost.preempt import preemption
    from rlpost.watchdog import Watchdog
    clock = Clock()
    recipe = SimpleNamespace(watchdog=Limits(**{limits}), preempt=Preempt(budget_s=1.0))
    with preemption.listening(), Watchdog(recipe, SimpleNamespace(rank=0, size=1), clock), clock("generate"):
        {body}
    """
    return started(["-c", textwrap.dedent(code)], tmp_path)


def test_a_process_that_cannot_leave_within_its_budget_ends_with_the_code_of_a_leave(tmp_path) -> None:
    done = in_a_process("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", tmp_path)
    assert done.returncode == PREEMPTED, done.stderr
    assert "not able to leave within preempt.budget_s=1 s (phase generate)" in done.stderr


def test_a_stuck_process_shows_its_stacks_and_ends(tmp_path) -> None:
    done = in_a_process("time.sleep(60)", tmp_path, stop_s=2.0)
    assert done.returncode == 1, done.stderr
    assert "stuck in phase generate for watchdog.stop_s=2 s" in done.stderr
    assert 'File "<string>"' in done.stderr  # where the main thread was


def test_the_loss_of_another_rank_is_one_sentence_and_not_the_words_of_a_transport() -> None:
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RunError, match=re.escape(GONE)), watchdog(Preemption(), Clock()):
        raise lost
    with pytest.raises(ZeroDivisionError), watchdog(Preemption(), Clock()):
        raise ZeroDivisionError


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_leave_for_a_signal_to_one_and_go_on_and_a_stopped_rank_is_named(tmp_path) -> None:
    lab = lab_with_accidents(tmp_path)
    assert two_ranks(lab, "whole", "9:1:-").returncode == 0
    left = two_ranks(lab, "left", "1:12:SIGUSR1")  # only the second rank, in the second step's rewards
    assert left.returncode == PREEMPTED, left.stderr[-3000:]
    assert "left: asked to leave by SIGUSR1" in left.stderr

    resumed = two_ranks(lab, "left", "1:4:SIGSTOP", "watchdog.report_s=4")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert re.search(r"rank 0 \(.*\): \d+ s in phase reward", resumed.stderr), resumed.stderr[-3000:]
    assert re.search(r"rank 1 \(.*\): no sign of life .* it was in phase \w+", resumed.stderr)
    assert logged(lab, "left") == logged(lab, "whole")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_is_killed_ends_the_other_soon_and_is_named(tmp_path) -> None:
    lab = lab_with_accidents(tmp_path)
    begun = time.monotonic()
    killed = two_ranks(lab, "killed", "1:12:SIGKILL")
    assert killed.returncode == 1
    assert "torchrun: rank 1 was ended by SIGKILL (out of memory?)" in killed.stderr
    assert f"error (rank 0): {GONE}" in killed.stderr
    assert "Traceback" not in killed.stderr, killed.stderr[-3000:]
    assert time.monotonic() - begun < 300


def lab_with_accidents(folder: Path) -> Path:
    lab = make_lab(folder)
    (lab / "mylab/accidents.py").write_text(textwrap.dedent(ACCIDENTS))
    return lab


def two_ranks(lab: Path, name: str, accident: str, *overrides: str):
    own = ["generator.kind=hf", "engine.zero_stage=3", "sft=null", "tasks.eval=null", "steps=3", "save_every=0"]
    own += ["rewards=[{use: exact_chain}, {use: 'mylab.accidents:happens', isolate: false}]", "resume=auto"]
    named = [f"run_dir={lab / 'runs'}", f"name={name}"]
    return started([*TWO_RANKS, str(lab / "tiny.yaml"), *named, *own, *overrides], lab, ACCIDENT=accident)


def test_watchdog_and_leave_know_no_clock_that_can_jump() -> None:
    for name in ("watchdog", "preempt", "deadline", "torchrun"):
        assert "time.time(" not in (ROOT / f"rlpost/{name}.py").read_text()
