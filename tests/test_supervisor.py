"""Processes of generator servers: started, started again, and ended, also when their parent is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlpost.errors import RunError
from rlpost.recipe import read_tree
from rlpost.servers import command
from rlpost.servers.start import Started

STAYS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
STAYS += "print('here', flush=True); time.sleep(60)"
ENDS = "print('no such model'); raise SystemExit(3)"
BELOW = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'rlpost.servers.supervisor', sys.argv[1]])"


def supervise(folder: Path, *programs: str, restarts: int = 3, below: bool = False) -> subprocess.Popen[bytes]:
    """A supervisor of small programs in place of servers."""
    servers = [
        {"url": f"http://127.0.0.1:{i}", "command": [sys.executable, "-c", one], "environment": {"OWN": str(i)}}
        for i, one in enumerate(programs)
    ]
    (folder / "spec.json").write_text(json.dumps({"folder": str(folder), "restarts": restarts, "servers": servers}))
    module = ["-c", BELOW] if below else ["-m", "rlpost.servers.supervisor"]
    return subprocess.Popen([sys.executable, *module, str(folder / "spec.json")])


def told(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / "servers.json").read_text())["servers"]
    except (OSError, ValueError):
        return []


def until(what: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def left(pgid: int) -> int:
    """Processes of a group that have not ended."""
    fields = [stat.rpartition(")")[2].split() for stat in stats()]
    return sum(int(one[2]) == pgid and one[0] != "Z" for one in fields)


def stats() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append(file.read_text())
        except OSError:
            continue
    return found


def test_a_server_that_ends_is_started_again_and_all_end_with_their_children(tmp_path: Path) -> None:
    process = supervise(tmp_path, STAYS, STAYS)
    until(lambda: [one["starts"] for one in told(tmp_path)] == [1, 1])
    first, second = (one["pid"] for one in told(tmp_path))
    until(lambda: left(first) == 2 and left(second) == 2)
    os.kill(first, signal.SIGKILL)
    until(lambda: told(tmp_path)[0]["starts"] == 2)
    assert left(first) == 0 and told(tmp_path)[1]["pid"] == second
    assert "the server ended with -9 (start 1); it is started again" in (tmp_path / "0.log").read_text()
    pids = [one["pid"] for one in told(tmp_path)]
    os.killpg(second, signal.SIGSTOP)  # one that is stopped does not stay behind
    process.terminate()
    assert process.wait(20) == 0
    assert [left(pid) for pid in pids] == [0, 0]


def test_servers_end_where_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    parent = supervise(tmp_path, STAYS, below=True)
    until(lambda: len(told(tmp_path)) == 1)
    [pid] = [one["pid"] for one in told(tmp_path)]
    parent.kill()
    parent.wait()
    until(lambda: left(pid) == 0)
    assert left(pid) == 0


def test_a_server_that_does_not_start_is_given_up_and_its_log_is_repeated(tmp_path: Path) -> None:
    process = supervise(tmp_path, ENDS, restarts=1)
    assert process.wait(20) == 1
    assert [one["state"] for one in told(tmp_path)] == ["given up"] and told(tmp_path)[0]["starts"] == 2
    problem = Started(["http://127.0.0.1:0"], "k", "r", tmp_path, process).problem()
    assert problem is not None and "server 0 must start and stay (it ended 2 times" in problem
    assert "  no such model" in problem


def test_the_command_has_dummy_weights_the_gate_and_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLPOST_SERVER_KEY", "of-this-test")
    options = "generator.options={enable_prefix_caching: false, max_num_batched_tokens: 512}"
    recipe, _ = read_tree({}, ["model.path=m", "generator.kind=remote_vllm", options], name="test")
    spec = command.make_spec(recipe, Path("m"), 96, tmp_path, gpus=0)
    [server] = spec["servers"]
    line = " ".join(server["command"])
    assert "--load-format dummy" in line and "--middleware rlpost.generate.server_gate.Gate" in line
    assert "--no-enable-prefix-caching" in line and "--max-num-batched-tokens 512" in line
    assert '{"backend": "rlpost_shm"}' in line and "--max-model-len 96" in line
    assert "of-this-test" not in json.dumps(spec) and server["url"].startswith("http://127.0.0.1:")


def test_each_server_has_gpus_of_its_own_from_the_end(tmp_path: Path) -> None:
    asked = "generator.servers={replicas: 2, tensor_parallel: 2, base_port: 9000, host: 0.0.0.0}"
    recipe, _ = read_tree({}, ["model.path=m", "generator.kind=remote_vllm", asked], name="test")
    spec = command.make_spec(recipe, Path("m"), 96, tmp_path, gpus=8)
    assert [one["environment"]["CUDA_VISIBLE_DEVICES"] for one in spec["servers"]] == ["4,5", "6,7"]
    assert [one["url"].rpartition(":")[2] for one in spec["servers"]] == ["9000", "9001"]
    assert '{"backend": "nccl"}' in spec["servers"][0]["command"]
    with pytest.raises(RunError, match="needs 2 GPUs of this node a server"):
        command.make_spec(recipe, Path("m"), 96, tmp_path, gpus=3)
