"""Rewards that misbehave where an answer tells them to, for tests of the processes in which rewards run."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlpost.types import Group, Rollout, Score


def obeys(rollout: Rollout, *, mark: str = "") -> float:
    """1 for `right`, 0 for anything that is no command."""
    command = rollout.text
    if command == "sleep":
        time.sleep(3600)
    elif command == "sleep, and catch all":
        while True:
            try:
                time.sleep(3600)
            except BaseException:  # noqa: S110
                pass
    elif command == "block":  # in C, where no alarm gets through
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
        time.sleep(3600)
    elif command == "allocate":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    elif command == "exit":
        sys.exit(3)
    elif command == "die":
        os._exit(3)
    elif command == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif command == "fork":
        os.fork()
    elif command == "leave a child" or command == "leave a child and hang":
        child = subprocess.Popen(["sleep", "3600"])
        Path(mark).write_text(str(child.pid))
        if command.endswith("hang"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)
    elif command == "raise":
        raise ValueError("as it was told")
    elif command == "nonsense":
        return "1"  # type: ignore[return-value]
    elif command == "cannot":
        return None  # type: ignore[return-value]
    return float(command == "right")


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
