"""Processes in which rewards run, so that one that hangs, dies or eats memory costs its own verdict and nothing else.

They are made by a fork server that never loads torch, hold no lock of ours, and end with this process however that
ends. A reward that takes too long is stopped inside its process; where that does not help, the process is killed with
whatever it has started, and another takes its place.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import inspect
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rlpost.cluster_recipe import Failure
from rlpost.errors import RunError
from rlpost.judging import POLL_S, Shape, judge, shape_of
from rlpost.plugins import bind
from rlpost.preempt import preemption
from rlpost.types import Group, Rollout, Verdict

GRACE_S = 5.0
"""Between the alarm inside a process and the kill from outside."""
MOST_WORKERS = 8
MOST_TRIES = 3
PR_SET_PDEATHSIG = 1
_bound: list[Callable[..., Any]] = []
"""In a worker: the rewards, in the order of the pool's plug-ins."""


@dataclass
class Question:
    """What a reward was asked, and who has it in hand."""

    index: int
    """Of the plug-in."""
    rollouts: list[Rollout]
    group: Group | None
    seconds: float | None
    """For one rollout."""
    future: Any = None
    pool: Any = None
    tries: int = 0
    until: float = math.inf
    """When it is overdue, by a clock that does not jump; the pool goes by the clock of the day."""


class Judges:
    """A pool of such processes for some plug-ins; it starts with the first question."""

    def __init__(self, plugins: Sequence[Mapping[str, Any]], limits: Failure) -> None:
        self.plugins, self.limits = [dict(plugin) for plugin in plugins], limits
        self.workers = limits.reward_workers or default_workers()
        self._pool: ProcessPool | None = None
        self._folder: Path | None = None

    def ask(self, question: Question) -> Question:
        """Hand a question to the pool, and do not wait."""
        if self._pool is None or not self._pool.active:
            self.close()
            self.start()
        assert self._pool is not None
        seconds = question.seconds
        limit = None if seconds is None else seconds * max(len(question.rollouts), 1) + GRACE_S
        question.until = math.inf if limit is None else time.monotonic() + limit
        arguments = question.index, question.rollouts, question.group, seconds
        question.pool, question.tries = self._pool, question.tries + 1
        question.future = self._pool.schedule(work, args=arguments, timeout=limit)
        return question

    def answer(self, question: Question) -> list[Verdict]:
        """Wait for the verdicts, one a rollout; leaves where the run is asked to."""
        while not wait([question.future], timeout=POLL_S).done:
            preemption.poll()
        preemption.get_on()
        try:
            return list(question.future.result())
        except BrokenProcessPool as error:  # a process died between two questions, which takes a pool with it
            if question.tries == MOST_TRIES:
                raise RunError(
                    f"failure: the processes with rewards must live, and {MOST_TRIES} times ended idle: "
                    "see what kills them; a system that is out of memory does"
                ) from error
            if question.pool is self._pool:
                self.close()
            return self.answer(self.ask(question))
        except FutureTimeout:
            if time.monotonic() < question.until and question.tries < MOST_TRIES:
                return self.answer(self.ask(question))
            note = f"did not come back within {question.seconds:g} s a rollout, and was killed"
            failed = Verdict(None, "timeout", note=note)
        except ProcessExpired as error:
            failed = Verdict(None, "crash", note=how_it_ended(error.exitcode))
        self._end_leftovers()
        return [failed] * len(question.rollouts)

    def start(self) -> None:
        """Start the processes; they load what rewards need meanwhile."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rlpost.judges", *needs(self.plugins, shipped_only=True)])
        self._folder = Path(tempfile.mkdtemp(prefix="rlpost-judges-"))
        memory = self.limits.reward_memory_gib
        arguments = (
            self.plugins,
            self.workers,
            None if memory is None else int(memory * 2**30),
            str(self._folder),
            list(sys.path),
        )
        atexit.register(self.close)
        self._pool = ProcessPool(self.workers, initializer=begin, initargs=arguments, context=context)

    def close(self) -> None:
        """End the processes and whatever they have started; a later question starts others."""
        if self._pool is not None:
            atexit.unregister(self.close)
            self._pool.stop()  # from here on no dead worker is replaced
            self._end_leftovers(everything=True)
            self._pool.join()
            assert self._folder is not None
            shutil.rmtree(self._folder, ignore_errors=True)
            self._pool = self._folder = None

    def _end_leftovers(self, *, everything: bool = False) -> None:
        """Kill what dead workers have left behind: each was the leader of a process group of its own."""
        assert self._folder is not None
        for mark in self._folder.iterdir():
            pid = int(mark.name)
            if everything or not is_alive(pid):
                mark.unlink(missing_ok=True)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


def default_workers() -> int:
    """A core each, shared among the ranks of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


def needs(plugins: Sequence[Mapping[str, Any]], *, shipped_only: bool) -> list[str]:
    """Modules that rewards load when they are first asked, which takes long: `NEEDS` in their file."""
    found: list[str] = []
    for plugin in plugins:
        if ":" in plugin["use"] and shipped_only:
            continue
        module = inspect.getmodule(bind(plugin, "rewards", where="rewards", skip=1).func)
        found += getattr(module, "NEEDS", ())
    return found


def how_it_ended(status: int) -> str:
    """What an exit status says.

    >>> how_it_ended(-11), how_it_ended(3)
    ('its process was killed by SIGSEGV', 'its process ended with exit code 3')
    """
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return f"its process ended with exit code {status}"


def is_alive(pid: int) -> bool:
    """Whether a process of this user is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def begin(plugins: Sequence[Mapping[str, Any]], workers: int, memory: int | None, folder: str, path: list[str]) -> None:
    """In a new worker: a process group of its own, its limits, and the rewards."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    Path(folder, str(os.getpid())).touch()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ["RLPOST_JUDGES"] = str(workers)
    sys.path[:] = path
    try:
        _bound[:] = [bind(plugin, "rewards", where="rewards", skip=1) for plugin in plugins]
        for module in needs(plugins, shipped_only=False):
            importlib.import_module(module)
    except Exception as error:  # it went well in the trainer's process; said with the first question
        _bound[:] = [partial(_say, f"could not be loaded in a process apart: {error}")] * len(plugins)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def work(index: int, rollouts: list[Rollout], group: Group | None, seconds: float | None) -> list[Verdict]:
    """In a worker: ask one reward. What it draws at random depends on the rollouts alone, not on who was asked."""
    me = os.getpid()
    call = _bound[index]
    shape: Shape = shape_of(call)
    random.seed("".join(f"{rollout.task.key}:{rollout.text}" for rollout in rollouts))
    try:
        found = judge(call, shape, rollouts, seconds=seconds, group=group)
    finally:
        if os.getpid() != me:
            os._exit(0)  # a fork of the reward's making, which must not answer too
    if any(verdict.failed for verdict in found):
        end_children()  # else they may be helpers that it means to keep
    return found


def _say(message: str, rollout: Rollout) -> None:
    raise RunError(message)


def end_children() -> None:
    """Kill what a reward has started and not ended."""
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)
