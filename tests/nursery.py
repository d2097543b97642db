"""Processes that begin with the libraries already imported, which is most of what a short run costs.

`run_module` forks them from one process that has imported everything and done nothing else: each is a process of its
own, with its own environment, folder, signals and exit code. They share the order of sets, so that what must not
depend on it is run by an interpreter of its own: `anew` in `lab`, servers, `torchrun`, the README's commands.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIBRARIES = (
    *("torch", "deepspeed", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "vllm", "vllm.entrypoints.llm", "peft", "datasets", "pandas"),
    *("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer", "tensorboard"),
    *("torch.utils.tensorboard", "rlpost.check", "rlpost.train", "rlpost.report.page"),
)
FORK_SAFE = {"jemalloc_bg_thd"}
"""A thread of pyarrow's allocator, which knows of forks."""
TICK_S = 0.01


def run_module(
    module: str, *arguments: str, env: Mapping[str, str], cwd: Path = ROOT, ranks: int = 1, timeout_s: float = 400
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS`, on some ranks; where one of them fails the others are told to end."""
    from rlpost.servers.command import free_ports

    env = outside(env)
    if ranks > 1:
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1, "127.0.0.1", None)[0])}
    argv = [module, *arguments]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        one = {"argv": argv, "out": out.name, "err": err.name, "cwd": str(cwd)}
        mine = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        codes = run([one | {"env": env | place} for place in mine], timeout_s)
        worst = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(argv, worst, out.read(), err.read())


def outside(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without the ranks that a test's own process may have joined."""
    joined = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in env.items() if key not in joined}


def run(processes: Sequence[dict[str, Any]], timeout_s: float) -> list[int]:
    """Exit codes of processes that are started together."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    try:
        server.stdin.write(json.dumps({"processes": processes, "timeout_s": timeout_s}) + "\n")
        server.stdin.flush()
        found = json.loads(server.stdout.readline())
    except BaseException:  # nobody listens any more: it ends, with its children
        server.stdin.close()
        _server.cache_clear()
        raise
    if found is None:
        raise subprocess.TimeoutExpired([one["argv"] for one in processes], timeout_s)
    return list(found)


@cache
def _server() -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=env, cwd=ROOT)
    atexit.register(server.communicate)  # it ends with what it reads from
    return server


def serve() -> None:
    """Import everything, then fork what is asked for, until there is nobody to ask."""
    from rlpost.__main__ import quiet
    from rlpost.generate.local_vllm import set_environment

    quiet()
    set_environment(on_cpu=True)
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries say is no answer
    for library in LIBRARIES:
        importlib.import_module(library)
    threads = {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")} - FORK_SAFE
    assert len(threads) == 1, f"{threads}: what a thread holds would be held for ever in a process that is forked"
    gc.freeze()
    while asked := sys.stdin.readline():
        asked, pids = json.loads(asked), []
        for one in asked["processes"]:
            pids.append(os.fork())
            if not pids[-1]:
                os.close(answer)
                return become(**one)
        os.write(answer, (json.dumps(codes(pids, asked["timeout_s"])) + "\n").encode())


def codes(pids: Sequence[int], timeout_s: float) -> list[int] | None:
    """Wait for processes; where nobody waits any more or time is up they are killed, where one fails told to end."""
    until, found = time.monotonic() + timeout_s, dict[int, int]()
    while len(found) < len(pids):
        over = bool(select.select([0], [], [], TICK_S)[0]) or time.monotonic() > until
        for pid in [pid for pid in pids if pid not in found]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
            elif over or any(found.values()):
                os.kill(pid, signal.SIGKILL if over else signal.SIGTERM)
    return None if time.monotonic() > until else [found[pid] for pid in pids]


def become(argv: list[str], out: str, err: str, cwd: str, env: dict[str, str]) -> None:
    """Be the process that was asked for, to its end."""
    for fd, file, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(file, flags | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, fd)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[3:]]
    sys.argv = list(argv)
    sys.modules.pop(f"{argv[0]}.__main__", None)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
