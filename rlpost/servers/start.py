"""Starts the servers of a run as its child, and tells every rank where they are."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rlpost.errors import RunError
from rlpost.model_source import context_length
from rlpost.recipe import Recipe
from rlpost.servers.command import make_spec
from rlpost.servers.replica import KEY
from rlpost.world import World

TAIL = 12
"""Lines of a server's log that a message repeats."""


@dataclass
class Started:
    """Where a run's servers are.

    >>> Started(["http://127.0.0.1:8100"], key="k", run="r").problem() is None
    True
    """

    urls: list[str]
    key: str = field(repr=False)
    run: str
    """A name for what this run shares with its servers."""
    folder: Path | None = None
    """Where the supervisor writes; None: the servers are somebody else's."""
    process: subprocess.Popen[bytes] | None = None
    """The supervisor, on the main rank."""

    def problem(self) -> str | None:
        """Why no server is going to come, where that is certain."""
        if self.folder is None:
            return None
        try:
            told = json.loads((self.folder / "servers.json").read_text())["servers"]
        except (OSError, ValueError):
            told = []
        for i, server in enumerate(told):
            if server["state"] == "given up":
                return (
                    f"generator.servers: server {i} must start and stay (it ended {server['starts']} times, and "
                    f"generator.servers.restarts bounds that); the end of {self.folder}/{i}.log:\n{self._tail(i)}"
                )
        if self.process is not None and self.process.poll() is not None:
            return f"generator.servers: the supervisor has ended ({self.process.returncode}): see {self.folder}"
        return None

    def _tail(self, i: int) -> str:
        assert self.folder is not None
        lines = (self.folder / f"{i}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-TAIL:])

    def end(self) -> None:
        """End the servers that this run has started, and wait until they have."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()  # the kernel then ends its servers
                self.process.wait()


def start_servers(recipe: Recipe, model: Path, folder: Path, world: World) -> Started | None:
    """The servers of `generator.kind=remote_vllm`, on their way; every rank calls it."""
    if recipe.generator.kind != "remote_vllm":
        return None
    given = recipe.generator.servers.urls
    started = world.together(lambda: _start(recipe, model, folder / "servers", world) if world.is_main else None)
    mine = (started.urls, started.key, started.run, started.folder) if started is not None else None
    urls, key, run, where = world.all_gather_object(mine)[0]
    return started or Started(urls, key, run, where if not given else None)


def _start(recipe: Recipe, model: Path, folder: Path, world: World) -> Started:
    run = secrets.token_hex(4)
    if recipe.generator.servers.urls:
        key = os.environ.get(KEY, "")
        if not key:
            raise RunError(f"{KEY} must be set in the environment to the key of the servers in generator.servers.urls")
        return Started([url.rstrip("/") for url in recipe.generator.servers.urls], key, run)
    key = os.environ.get(KEY) or secrets.token_urlsafe(24)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "servers.json").unlink(missing_ok=True)
    spec = make_spec(recipe, model, context_length(recipe.model, model), folder.absolute(), gpus=gpus_here(world))
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    process = subprocess.Popen(
        [sys.executable, "-m", "rlpost.servers.supervisor", str(folder / "spec.json")],
        env=os.environ | {KEY: key},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is for the trainer, which ends them when it has saved
    )
    return Started([one["url"] for one in spec["servers"]], key, run, folder.absolute(), process)


def gpus_here(world: World) -> int:
    """GPUs of this node; 0 where the trainer is on a CPU."""
    if world.device.type != "cuda":
        return 0
    import torch

    return torch.cuda.device_count()
