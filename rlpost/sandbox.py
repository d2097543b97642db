"""A program that nobody has read, run where it can do no harm: `sandbox_inside.py` cuts it off, this keeps the time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rlpost.errors import RunError

INSIDE = Path(__file__).with_name("sandbox_inside.py")
NO_NAMESPACES, TIME_OVER = 97, 98
SHOWN = 1 << 16
"""Bytes of output that are kept; of a result, all that `Limits.files_mib` allows."""
START_S = 5.0
"""What it may take to get ready, beside the program's own time."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    >>> Limits(seconds=1.0).memory_mib
    512
    """

    seconds: float = 5.0
    """From its start to its end, by the clock on the wall."""
    memory_mib: int = 512
    """Address space of each process."""
    files_mib: int = 16
    """All its files together, which are in memory; and each of its outputs."""
    processes: int = 8
    """With threads."""
    namespaces: bool = True
    """False: only the limits, where the system allows no more. Then network, files and processes are open to it."""


@dataclass(frozen=True)
class Ran:
    """How it went.

    >>> Ran(0, "2\\n", "", "", timed_out=False).status
    0
    """

    status: int
    """0, the program's own, or 128 + the signal that ended it."""
    output: str
    errors: str
    result: str
    """What it wrote to file descriptor 3."""
    timed_out: bool


def run(program: str, stdin: str = "", limits: Limits | None = None) -> Ran:
    """Run a Python program to its end, or to the end of its time."""
    limits = limits or Limits()
    with files(program, stdin) as (code, given, output, errors, result), folder() as root:
        asked = asdict(limits) | {"root": root, "python": os.path.realpath(sys.executable)}
        asked |= {"program": code.fileno(), "input": given.fileno(), "result": result.fileno()}
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", str(INSIDE), json.dumps(asked)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            pass_fds=(code.fileno(), given.fileno(), result.fileno()),
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        )
        timed_out = not ended(process, limits.seconds + START_S, given)
        status = process.returncode
        printed, complaint = text_of(output, SHOWN), text_of(errors, SHOWN)
        if status == NO_NAMESPACES and complaint.startswith("no namespaces"):
            raise RunError(
                f"sandbox: this system must allow namespaces to run a program apart ({complaint.strip()}): allow user "
                "namespaces, or set sandbox=limits, which leaves network and files open to it"
            )
        over = timed_out or status in (TIME_OVER, 128 + signal.SIGXCPU)
        return Ran(status, printed, complaint, text_of(result, limits.files_mib << 20), timed_out=over)


def ended(process: subprocess.Popen[Any], seconds: float, given: IO[bytes]) -> bool:
    """Wait so long for a process to end by itself, then kill it and all that it has started."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def files(program: str, stdin: str) -> Iterator[Sequence[IO[bytes]]]:
    """The program, its input, and where its output, errors and result go: files without a name."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(5)]
        for file, text in zip(opened, (program, stdin), strict=False):
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            file.seek(0)
        yield opened


@contextmanager
def folder() -> Iterator[str]:
    """An empty folder to put the program's own file system on."""
    name = tempfile.mkdtemp(prefix="rlpost-sandbox-")
    try:
        yield name
    finally:
        shutil.rmtree(name, ignore_errors=True)


def text_of(file: IO[bytes], size: int) -> str:
    """The beginning of what was written to a file."""
    file.seek(0)
    return file.read(size).decode("utf-8", "replace")
