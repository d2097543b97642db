"""Two real vLLM servers that are trained with: exact resume, updates in flight, servers that are killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, make_lab, train
from ranks import run_ranks
from test_generate import learn, trainer_logps

from rlpost.servers.replica import Lost, Replica

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEY = os.environ.get("RLPOST_SERVER_KEY", "secret-of-the-test")
OWN = ("generator.kind=remote_vllm", "sft=null", "evaluation.n=1")
SLOW = '''
import time


def rest(rollout) -> float:
    """Leave the processor to a server that starts, and reward nothing."""
    time.sleep(0.05)
    return float(len(rollout.token_ids) % 2)
'''
SERVERS = ("generator.servers.replicas=2", "generator.servers.timeout_s=8")


def wait_until(what: Any, seconds: float, said: Any = lambda: "") -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, said()
        time.sleep(0.05)


def answers(replica: Replica, **wanted: Any) -> bool:
    """Whether a server answers, and says this of itself."""
    try:
        return wanted.items() <= replica.state(5.0).items()
    except Lost:
        return False


def members(pgid: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == pgid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def left_over() -> list[str]:
    """Weights in shared memory whose writer, which their name ends in, has ended."""
    names = [path.name for path in Path("/dev/shm").glob("*rlpost-weights-*")]
    return [name for name in names if not Path("/proc", name.rpartition("-")[2]).exists()]


class Served:
    """`rlpost serve` with two servers."""

    def __init__(self, lab: Path) -> None:
        self.lab, self.folder = lab, lab / "runs/served/servers"
        env = os.environ | {"RLPOST_SERVER_KEY": KEY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "rlpost",
            "serve",
            str(lab / "tiny.yaml"),
            f"run_dir={lab / 'runs'}",
            "name=served",
        ]
        with (lab / "serve.log").open("w") as log:
            self.process = subprocess.Popen([*command, *OWN, *SERVERS], cwd=lab, env=env, stdout=log, stderr=log)
        wait_until(lambda: self.said().count("server: http") == 2 or self.process.poll() is not None, 120, self.said)
        self.urls = [line.split()[1] for line in self.said().splitlines() if line.startswith("server: ")]
        self.replicas = [Replica(url, KEY, timeout_s=10.0) for url in self.urls]
        wait_until(lambda: all(answers(one) for one in self.replicas), 300, self.said)

    def said(self) -> str:
        return (self.lab / "serve.log").read_text()

    @property
    def pids(self) -> list[int]:
        [file] = self.folder.glob("*/servers.json")
        return [one["pid"] for one in json.loads(file.read_text())["servers"]]

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(40) == 0, self.said()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(make_lab(tmp_path_factory.mktemp("served")))
    pids = served.pids
    os.environ["RLPOST_SERVER_KEY"] = KEY
    yield served
    del os.environ["RLPOST_SERVER_KEY"]
    served.stop()
    assert [members(pid) for pid in pids] == [[], []]
    assert left_over() == []
    logs = "".join(file.read_text() for file in served.folder.glob("*/*"))
    assert KEY not in logs + served.said()


def test_servers_want_the_key_and_serve_nothing_before_they_have_weights(served: Served) -> None:
    import httpx

    for route in ("/rlpost/state", "/weight_info", "/v1/models", "/is_paused"):
        assert httpx.get(served.urls[0] + route, trust_env=False).status_code == 401
    assert httpx.get(served.urls[0] + "/health", trust_env=False).status_code == 200
    state = served.replicas[0].state()
    assert (state["version"], state["open"]) == (None, False)


def test_a_run_that_is_cut_off_resumes_to_the_same_figures(served: Served) -> None:
    lab, asked = served.lab, [*OWN, f"generator.servers.urls={json.dumps(served.urls)}", "steps=3", "save_every=1"]
    whole = train(lab, "whole", *asked)
    train(lab, "cut", *asked, "steps=1")
    assert train(lab, "cut", *asked, "resume=auto") == whole
    steps = [line for line in whole if "servers/alive" in line]
    assert [line["servers/alive"] for line in steps] == [2, 2, 2] and steps[-1]["canary/logp_diff_max"] < 1e-5


MODES = ("recompute", "wait", "keep")


@pytest.fixture(scope="module")
def updated(served: Served) -> dict[str, Any]:
    [model] = served.lab.glob("runs/models/init-*")
    [found] = run_ranks(in_flight, num_ranks=1, urls=served.urls, model=str(model))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_an_update_in_flight_leaves_each_token_with_the_version_that_wrote_it(
    updated: dict[str, Any], mode: str
) -> None:
    found = updated[mode]
    assert found["furthest"] < 1e-4, found
    under_way = [] if mode == "wait" else [[0, 1]]
    assert found["versions"] == [[0], *under_way, [1]]  # the last are those that had not begun
    assert found["again"] == [[1]]


def in_flight(world: Any, urls: list[str], model: str) -> dict[str, Any]:
    return {mode: in_flight_as(world, urls, model, mode) for mode in MODES}


def in_flight_as(world: Any, urls: list[str], model: str, mode: str) -> dict[str, Any]:
    """Rollouts whose weights change while they are written, against the trainer's log-probs of each version."""
    import torch

    from rlpost.engine import Engine
    from rlpost.generate.base import Canary, canary_tokens
    from rlpost.generate.remote_vllm import RemoteVllm
    from rlpost.policy import load_policy
    from rlpost.recipe import EngineRecipe, GeneratorRecipe, Model, Prompting, Recipe
    from rlpost.render import Renderer, load_tokenizer
    from rlpost.server_recipe import Servers
    from rlpost.servers.start import Started
    from rlpost.types import Request, Sampling, Task

    generator_recipe = GeneratorRecipe(
        kind="remote_vllm", seeding="request", servers=Servers(urls=urls, in_flight=mode)
    )
    recipe = Recipe(model=Model(path=model, dtype="float32"), generator=generator_recipe)
    policy = load_policy(Path(model), recipe.model)
    asked = EngineRecipe(lr=0.05, eps=1e-3)
    engine = Engine(policy, asked, dtype="float32", temperature=1.0, total_updates=9, world=world)
    renderer = Renderer(load_tokenizer(Path(model)), Prompting(), context=64)
    tokens = canary_tokens((3, 4, 5), len(renderer.tokenizer))
    canary = Canary.of(tokens, tolerance=1e-3, device=torch.device("cpu"))
    generator = RemoteVllm(recipe, renderer, canary, world, Started(urls, KEY, "test"))
    requests = [Request(i, Task("a", "1"), (3, 4 + i % 4), n=16, seed=100 * i) for i in range(64)]
    sampling, asked_for = Sampling(max_new_tokens=48), 64 * 16  # of which a server answers 64 at once
    made: list[Any] = []
    in_the_middle = threading.Event()

    def generate() -> None:
        made.extend(generator.generate(requests, sampling, lambda rollouts: in_the_middle.set()))

    with generator.awake(engine, 0):
        before = generator.generate(requests[:1], Sampling(max_new_tokens=4))
    first = [parameter.detach().clone() for parameter in engine.deepspeed.module.parameters()]
    learn(engine, before)  # the servers do not know of it yet
    others = threading.Thread(target=generate)
    others.start()
    wait_until(lambda: sum(one.state()["busy"] for one in generator.fleet.replicas) == asked_for, 60)
    assert in_the_middle.wait(60)
    with generator.awake(engine, 1):
        others.join()
        again = generator.generate(requests[:4], Sampling(max_new_tokens=4))
    versions = sorted({tuple(one for _, one in rollout.versions) for rollout in made})
    made = [one for one in made if len(one.versions) > 1][:32] + made[::32]
    furthest_of = {1: per_token(engine, made)}
    with torch.no_grad():
        for parameter, value in zip(engine.deepspeed.module.parameters(), first, strict=True):
            parameter.copy_(value)
    furthest_of[0] = per_token(engine, made)
    generator.close()
    diffs = []
    for i, rollout in enumerate(made):
        for j in range(len(rollout.token_ids)):
            version = [one for start, one in rollout.versions if start <= j][-1]
            diffs.append(furthest_of[version][i][j])
    return {
        "furthest": max(diffs),
        "versions": versions,
        "again": sorted({tuple(one for _, one in rollout.versions) for rollout in again}),
    }


def per_token(engine: Any, rollouts: list[Any]) -> list[list[float]]:
    """|trainer - behaviour| log-prob of each token."""
    own = trainer_logps(engine, rollouts)
    pairs = zip(own, rollouts, strict=True)
    return [[abs(a - b) for a, b in zip(logp, one.behavior_logp, strict=True)] for logp, one in pairs]


def test_one_command_trains_through_servers_of_which_one_is_killed_and_one_stopped(tmp_path: Path) -> None:
    """Two ranks and two servers; in the middle of their answers one is killed, later the other does not go on."""
    lab = make_lab(tmp_path)
    log, metrics = lab / "log", lab / "runs/job/metrics.jsonl"
    (lab / "mylab/slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "rlpost.torchrun", "--standalone", "--nproc-per-node=2", "-m", "rlpost", "train"]
    asked = [
        "name=job",
        "rewards=[{use: 'mylab.slow:rest', isolate: false}]",
        f"run_dir={lab / 'runs'}",
        "steps=100000",
        "tasks.eval=null",
        "sampling.max_new_tokens=48",
    ]
    env = os.environ | {"RLPOST_SERVER_KEY": KEY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        own = [*OWN, *SERVERS, "generator.seeding=request", "sampling.group_size=16"]
        run = subprocess.Popen(
            [*command, str(lab / "tiny.yaml"), *asked, *own], cwd=lab, env=env, stdout=out, stderr=out
        )
    said = log.read_text
    try:
        told = lab / "runs/job/servers/servers.json"
        wait_until(lambda: told.exists() or run.poll() is not None, 120, said)
        servers = json.loads(told.read_text())["servers"]
        replicas = [Replica(one["url"], KEY, timeout_s=10.0) for one in servers]
        wait_until(lambda: metrics.exists() or run.poll() is not None, 400, said)
        wait_until(lambda: answers(replicas[0], busy=32), 60, said)
        os.kill(servers[0]["pid"], signal.SIGKILL)
        first = replicas[0].boot
        wait_until(lambda: answers(replicas[0], open=True) and replicas[0].boot != first, 300, said)
        assert members(servers[0]["pid"]) == []  # nothing is left of the first start
        wait_until(lambda: answers(replicas[1], busy=32), 60, said)
        os.killpg(servers[1]["pid"], signal.SIGSTOP)
        lines = metrics.read_text().count("\n")
        wait_until(lambda: metrics.read_text().count("\n") > lines + 2, 60, said)  # the other one answers for both
        os.killpg(servers[1]["pid"], signal.SIGCONT)
        back = json.loads(metrics.read_text().splitlines()[-1])["optim/steps"]
        wait_until(lambda: answers(replicas[1], open=True) and replicas[1].state()["version"] > back, 60, said)
        servers = json.loads(told.read_text())["servers"]
        run.terminate()
        assert run.wait(120) == 75, said()
    finally:
        run.kill()
    assert [one["starts"] for one in servers] == [2, 1]
    assert [members(one["pid"]) for one in servers] == [[], []]
    figures = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in figures] == list(range(len(figures)))
    assert {line["rollouts/num"] for line in figures} == {64} and {line["groups/num"] for line in figures} == {4}
    assert sum(line["servers/resent"] for line in figures) > 0 and {line["servers/alive"] for line in figures} >= {1, 2}
    assert max(line["canary/logp_diff_max"] for line in figures) < 1e-4
    assert left_over() == []
