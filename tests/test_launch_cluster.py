"""The very launch scripts for clusters: read by shellcheck, and run against a small stand-in for Slurm (`slurm.py`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from lab import ROOT, make_lab

from rlpost.preempt import PREEMPTED

OWN = ("generator.kind=hf", "sft=null", "tasks.eval=null", "steps=6", "save_every=0")
# In place of Python: writes down how it was called, and ends as CODES says of this start, or when it gets a signal.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
trap 'exit 75' USR1
read -ra codes <<<"$CODES"
code=${codes[${SLURM_RESTART_COUNT:-0}]}
[[ $code == wait ]] || exit "$code"
touch "$CALLS.waits"
while :; do sleep 0.1; done
"""

# The same for a run with servers, which end by a signal alone.
SERVING_PYTHON = """#!/usr/bin/env bash
echo "$* key $RLPOST_SERVER_KEY" >>"$CALLS"
[[ $3 == serve ]] || { sleep 1; exit "$CODES"; }
trap 'echo ended >>"$CALLS"; exit 0' USR1
while :; do sleep 0.1; done
"""


def stand_in(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a user for whom the commands of Slurm are the stand-in."""
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        (folder / "bin" / name).symlink_to(ROOT / "tests/slurm.py")
    joined = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {key: value for key, value in os.environ.items() if key not in joined}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own |= {"STANDIN": str(folder / "slurm"), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return own | {"RANKS_PER_NODE": "1", "RLPOST_HOME": str(ROOT)} | more


class Cluster:
    """The stand-in with a Python that only writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.env = stand_in(folder, CALLS=str(self.calls), RLPOST_HOME=str(folder))  # there is no .venv
        python = folder / "bin/python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def sbatch(self, codes: str, *options: str, **env: str) -> subprocess.Popen[str]:
        command = [str(self.folder / "bin/sbatch"), *options, str(ROOT / "launch/slurm.sh"), "recipe.yaml", "name=a b"]
        own = self.env | {"CODES": codes} | env
        return subprocess.Popen(command, cwd=self.folder, env=own, stdout=subprocess.PIPE, text=True)

    def log(self) -> str:
        return (self.folder / "rlpost-7001.log").read_text()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_shellcheck_has_nothing_to_say() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck must be installed: launch/setup.sh does, from the extra `dev`"
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_slurm_starts_one_torchrun_a_node_with_the_recipe_and_ends_as_it_did(cluster: Cluster) -> None:
    assert cluster.sbatch("0", "--nodes=2").wait(60) == 0
    calls = sorted(cluster.calls.read_text().splitlines())
    assert len(calls) == 2
    for node, call in enumerate(calls):
        assert f"-m rlpost.torchrun --nnodes 2 --node-rank {node} --nproc-per-node 1" in call
        assert call.endswith("--master-port 27001 -m rlpost train recipe.yaml resume=auto name=a b")


def test_slurm_starts_servers_on_the_last_nodes_and_ends_them_when_the_run_has_ended(cluster: Cluster) -> None:
    """Two nodes train through four servers on the two others, of which nobody but them knows the key."""
    python = cluster.folder / "bin/python"
    python.write_text(SERVING_PYTHON)
    assert cluster.sbatch("3", "--nodes=4", SERVER_NODES="2", SERVERS_PER_NODE="2").wait(60) == 3
    calls = cluster.calls.read_text().splitlines()
    ranks, servers = (sorted(call for call in calls if what in call) for what in ("rlpost.torchrun", "rlpost serve"))
    own = "generator.servers.replicas=2 generator.servers.host=0.0.0.0 generator.servers.base_port"
    assert [call.partition("key ")[0] for call in servers] == [
        f"-m rlpost serve recipe.yaml name=a b {own}={port} " for port in (47001, 47003)
    ]
    urls = ", ".join(f"http://127.0.0.1:{port}" for port in range(47001, 47005))
    for node, call in enumerate(ranks):
        assert f"-m rlpost.torchrun --nnodes 2 --node-rank {node} " in call
        assert f"name=a b generator.kind=remote_vllm generator.servers.urls=[{urls}] key " in call
    [key] = {call.rpartition("key ")[2] for call in (*ranks, *servers)}
    assert len(key) == 48 and key not in cluster.log()
    assert calls[-2:] == ["ended", "ended"] and len(calls) == 6


def test_slurm_wants_a_node_that_trains(cluster: Cluster) -> None:
    assert cluster.sbatch("0", "--nodes=2", SERVER_NODES="2").wait(60) == 2
    assert "SERVER_NODES must leave a node to train (got 2 of 2)" in cluster.log() and not cluster.calls.exists()


def test_slurm_queues_a_run_that_left_again_and_one_that_failed_not(cluster: Cluster) -> None:
    assert cluster.sbatch("75 75 1").wait(60) == 1
    assert len(cluster.calls.read_text().splitlines()) == 3
    assert cluster.log().count("job 7001 is queued again") == 2


def test_slurm_queues_a_job_again_only_so_often(cluster: Cluster) -> None:
    assert cluster.sbatch("75 75 75", RLPOST_RESTARTS="1").wait(60) == PREEMPTED
    assert len(cluster.calls.read_text().splitlines()) == 2


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_slurm_hands_a_signal_to_its_shell_on_to_the_ranks(cluster: Cluster, signal: str) -> None:
    job = cluster.sbatch("wait 0")
    while not Path(f"{cluster.calls}.waits").exists():
        assert job.poll() is None
        time.sleep(0.05)
    scancel = [str(cluster.folder / "bin/scancel"), "--batch", f"--signal={signal}", "7001"]
    subprocess.run(scancel, env=cluster.env, check=True)
    assert job.wait(60) == 0
    assert cluster.log().count("queued again") == 1


def test_slurm_reads_the_environment_file_and_prints_nothing_of_it(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.folder / "bin/python").write_text('#!/usr/bin/env bash\n[[ $HF_TOKEN == "hf_secret value" ]]\n')
    (tmp_path / "mine.env").write_text('HF_TOKEN="hf_secret value"\n')
    assert cluster.sbatch("", RLPOST_ENV=str(tmp_path / "mine.env")).wait(60) == 0
    assert "hf_secret" not in cluster.log()
    shutil.rmtree(tmp_path / "slurm")
    assert cluster.sbatch("", RLPOST_ENV=str(tmp_path / "none.env")).wait(60) == 2


def test_node_starts_a_rank_a_gpu(tmp_path: Path) -> None:
    programs = {"python": '#!/bin/sh\necho "$@"\n', "nvidia-smi": "#!/bin/sh\necho 'GPU 0: a\nGPU 1: b'\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")  # where there is no .venv

    def said(**env: str) -> str:
        own = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
        command = ["bash", str(tmp_path / "launch/node.sh"), "r.yaml", "steps=3"]
        return subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout

    line = "-m rlpost.torchrun --standalone --nproc-per-node {} -m rlpost train r.yaml resume=auto steps=3\n"
    assert said() == line.format(2)
    assert said(RANKS="5") == line.format(5)


def test_kubernetes_gives_its_script_what_it_asks_for_and_more_time_than_a_run_takes_to_leave() -> None:
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    script = (ROOT / "launch/kubernetes.sh").read_text()
    asked = set(re.findall(r'"\$\{(\w+):\?\}"', script))
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert asked and asked <= given.keys()
    assert container["command"][0] == "launch/kubernetes.sh" and (ROOT / container["command"][1]).exists()
    assert given["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(given["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["terminationGracePeriodSeconds"] > int(given["RLPOST_GRACE_S"]) > 240  # preempt.budget_s
    rules = job["spec"]["podFailurePolicy"]["rules"]
    ignored = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
    assert [PREEMPTED] in ignored


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_two_nodes_is_asked_to_leave_queued_again_and_ends(tmp_path: Path) -> None:
    """The README's account of Slurm, with real ranks."""
    lab = make_lab(tmp_path)
    env, where = stand_in(tmp_path), lab / "elsewhere"
    arguments = [str(lab / "tiny.yaml"), f"run_dir={lab / 'runs'}", "name=job", *OWN]
    command = [str(tmp_path / "bin/sbatch"), "--nodes=2", str(ROOT / "launch/slurm.sh"), *arguments]
    job = subprocess.Popen(command, cwd=where, env=env, stdout=subprocess.DEVNULL)
    metrics = lab / "runs/job/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert job.poll() is None, (where / "rlpost-7001.log").read_text()[-3000:]
        time.sleep(0.2)
    subprocess.run([str(tmp_path / "bin/scancel"), "--batch", "--signal=USR1", "7001"], env=env, check=True)
    log = where / "rlpost-7001.log"
    assert job.wait(800) == 0, log.read_text()[-3000:]
    assert log.read_text().count("launch/slurm.sh: the run was asked to leave; job 7001 is queued again") == 1
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(6))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_pods_find_each_other_leave_when_one_is_evicted_and_go_on(tmp_path: Path) -> None:
    """What Kubernetes runs in each pod, as two processes of this machine."""
    lab = make_lab(tmp_path)
    metrics = lab / "runs/job/metrics.jsonl"
    pods = start_pods(lab, "first")
    until = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < until and all(pod.poll() is None for pod in pods), said(lab, "first")
        time.sleep(0.1)
    pods[1].terminate()
    assert [pod.wait(200) for pod in pods] == [PREEMPTED, PREEMPTED], said(lab, "first")
    assert [pod.wait(300) for pod in start_pods(lab, "second")] == [0, 0], said(lab, "second")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(6))


def start_pods(lab: Path, name: str) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    joined = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in joined}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NODES": "2", "RANKS_PER_NODE": "1"}
    env |= {"RUN_ID": name, "HEAD": "127.0.0.1", "POD_IP": "127.0.0.1", "RENDEZVOUS_PORT": str(port)}
    command = [str(ROOT / "launch/kubernetes.sh"), str(lab / "tiny.yaml"), f"run_dir={lab / 'runs'}", "name=job", *OWN]
    pods = []
    for pod in range(2):
        with (lab / f"{name}-{pod}.log").open("wb") as log:
            pods.append(subprocess.Popen(command, cwd=lab / "elsewhere", env=env, stdout=log, stderr=log))
    return pods


def said(lab: Path, name: str) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(lab.glob(f"{name}-*.log")))
