"""`python -m rlpost.servers.supervisor SPEC`: starts generator servers, starts those again that end, and ends them all.

It ends when it is asked to, or when the process that started it is gone. Each server has a session of its own and is
ended as a whole; should this process be killed, the kernel ends them (`generate/shm_engine.py`, `register`). What it
knows stands in `servers.json` beside the logs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

TICK_S = 0.2
END_S = 10.0
"""How long a server may take to end by itself."""
LASTS_S = 120.0
"""A start that lasts so long counts as one that went well."""
BACKOFF_S = 60.0
"""The longest pause before a server is started again; it begins at a second and doubles."""


@dataclass
class Server:
    """One server and its process.

    >>> Server("http://127.0.0.1:8100", ["python", "-m", "vllm"], {}).state
    'to start'
    """

    url: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    since: float = 0.0
    in_a_row: int = 0
    """Starts that did not last."""
    due: float = 0.0
    state: str = "to start"
    """`to start`, `running`, or `given up`."""
    log: Path = field(default_factory=Path)

    def start(self) -> None:
        """Start it, with its log behind that of its earlier starts."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env={key: value for key, value in os.environ.items() if key not in NOT_INHERITED} | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.starts, self.since, self.state = self.starts + 1, time.monotonic(), "running"

    def tell(self, number: int) -> None:
        """Send a signal to all of its processes."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return


NOT_INHERITED = frozenset(
    {
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "DS_ACCELERATOR"),
    }
)
"""What a rank of the trainer is told, and its quiet."""


class Supervisor:
    """Some servers that run until this ends."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.folder = Path(spec["folder"])
        self.restarts = int(spec["restarts"])
        self.servers = [Server(**one) for one in spec["servers"]]
        for i, server in enumerate(self.servers):
            server.log = self.folder / f"{i}.log"
        self.asked = False
        """Whether it was asked to end."""
        self._parent = os.getppid()

    def run(self) -> int:
        """Until asked to end, the parent is gone, or no server can be kept running."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hear)
        try:
            while not self.asked and os.getppid() == self._parent:
                changed = [self._look_after(server) for server in self.servers]
                if any(changed):
                    self._write()
                if all(server.state == "given up" for server in self.servers):
                    return 1
                time.sleep(TICK_S)
        finally:
            self._end()
        return 0

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _look_after(self, server: Server) -> bool:
        """Start a server that is due, and see whether one has ended; whether anything has changed."""
        if server.state == "to start" and time.monotonic() >= server.due:
            server.start()
            return True
        if server.state != "running" or server.process is None or server.process.poll() is None:
            return False
        server.tell(signal.SIGKILL)  # what is left of it
        server.in_a_row = 1 if time.monotonic() - server.since > LASTS_S else server.in_a_row + 1
        again = server.in_a_row <= self.restarts
        server.state = "to start" if again else "given up"
        server.due = time.monotonic() + min(2.0 ** min(server.in_a_row - 1, 9), BACKOFF_S)
        with server.log.open("a") as log:
            then = "it is started again" if again else "it is given up"
            log.write(f"rlpost: the server ended with {server.process.returncode} (start {server.starts}); {then}\n")
        return True

    def _write(self) -> None:
        """Say what runs where, in one piece."""
        told = [
            {
                "url": server.url,
                "pid": server.process.pid if server.process is not None else None,
                "starts": server.starts,
                "state": server.state,
            }
            for server in self.servers
        ]
        new = self.folder / "servers.json.new"
        new.write_text(json.dumps({"servers": told}, indent=1))
        new.rename(self.folder / "servers.json")

    def _end(self) -> None:
        for server in self.servers:
            server.tell(signal.SIGTERM)
            server.tell(signal.SIGCONT)  # one that is stopped would not hear it
        until = time.monotonic() + END_S
        for server in self.servers:
            if server.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    server.process.wait(max(until - time.monotonic(), 0.0))
                server.tell(signal.SIGKILL)
                server.process.wait()


def main(path: str) -> int:
    """Supervise what the file says."""
    return Supervisor(json.loads(Path(path).read_text())).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
