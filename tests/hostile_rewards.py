"""Rewards that misbehave where an answer tells them to, for tests of the processes in which rewards run."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rlpost.types import Group, Rollout, Score


def sleep(mark: str) -> None:
    time.sleep(3600)


def sleep_and_catch_all(mark: str) -> None:
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(3600)


def block(mark: str) -> None:
    """Where no signal but the last gets through."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
    time.sleep(3600)


def allocate(mark: str) -> None:
    hoard = []
    while True:
        hoard.append(bytearray(1 << 28))


def leave_a_child(mark: str) -> None:
    with subprocess.Popen(["sleep", "3600"]) as child:
        Path(mark).write_text(str(child.pid))
        child.returncode = 0  # it is not waited for


def leave_a_child_and_hang(mark: str) -> None:
    leave_a_child(mark)
    block(mark)


def fail(mark: str) -> None:
    raise ValueError("as it was told")


COMMANDS: dict[str, Callable[[str], object]] = {
    **{one.__name__: one for one in (sleep, sleep_and_catch_all, block, allocate, leave_a_child, fail)},
    "leave_a_child_and_hang": leave_a_child_and_hang,
    "slow": lambda mark: time.sleep(0.8),
    "exit": lambda mark: sys.exit(3),
    "die": lambda mark: os._exit(3),
    "segfault": lambda mark: os.kill(os.getpid(), signal.SIGSEGV),
    "fork": lambda mark: os.fork(),
}


def obeys(rollout: Rollout, *, mark: str = "") -> float:
    """1 for `right`, 0 for anything that is no command."""
    if rollout.text in COMMANDS:
        COMMANDS[rollout.text](mark)
    if rollout.text == "nonsense":
        return "1"  # type: ignore[return-value]
    if rollout.text == "cannot":
        return None  # type: ignore[return-value]
    return float(rollout.text == "right")


def draws(rollout: Rollout) -> float:
    return random.random()


def who(rollout: Rollout) -> Score:
    return Score(1.0, parts={"pid": os.getpid()}, note=rollout.text)


async def waits(rollout: Rollout) -> float:
    if rollout.text == "sleep":
        await asyncio.sleep(3600)
    if rollout.text == "die":
        os._exit(3)
    await asyncio.sleep(0.01)
    return float(rollout.text == "right")


def longest(rollouts: list[Rollout]) -> list[float]:
    most = max(len(rollout.text) for rollout in rollouts)
    return [float(len(rollout.text) == most) for rollout in rollouts]


def rarity(group: Group) -> list[float | None]:
    """1 - share of the group that says the same."""
    texts = [rollout.text for rollout in group.rollouts]
    return [None if text == "cannot" else 1 - texts.count(text) / len(texts) for text in texts]


def too_few(group: Group) -> list[float]:
    return [0.0]
