"""What is wrong with `generator.servers` is said before anything starts."""

from __future__ import annotations

import json

import pytest

from rlpost import check_servers
from rlpost.check import check
from rlpost.check_servers import server_problems
from rlpost.recipe import read_tree

REMOTE = "generator.kind=remote_vllm"
PATHS = ("model.path=some/model", "tasks.train.path=some.jsonl")


def problems(*overrides: str, world_size: int = 1) -> list[str]:
    recipe, unread = read_tree({}, [*PATHS, REMOTE, *overrides], name="test")
    assert not unread
    return server_problems(recipe, world_size)


def servers(**fields: object) -> str:
    return f"generator.servers={json.dumps(fields)}"


def test_a_plain_recipe_has_no_problem() -> None:
    assert problems() == []
    assert problems(servers(urls=["http://node7:8100", "https://10.0.0.2:8100/"])) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"urls": ["node7:8100"]}, "must be like http://HOST:PORT"),
        ({"urls": ["http://node7:99999"]}, "must be like http://HOST:PORT"),
        ({"urls": ["http://me:secret@node7:8100"]}, "without a path or a key"),
        ({"urls": ["http://node7:8100/v1"]}, "without a path"),
        ({"urls": ["http://a:1", "http://a:1"]}, "must name each server once"),
        ({"urls": ["http://node7:8100"], "transfer": "shm"}, "transfer=shm needs servers on the trainer's node"),
        ({"urls": ["http://a:1"], "gpus": [1]}, "gpus is for servers that the run starts"),
        ({"replicas": 2, "gpus": [1]}, "gpus must name replicas * tensor_parallel * data_parallel = 2 different"),
        ({"replicas": 2, "gpus": [1, 1]}, "= 2 different GPUs"),
        ({"replicas": 4, "base_port": 65535}, "base_port and the 4 after it must be ports (got 65535)"),
    ],
)
def test_each_problem_names_its_key(fields: dict[str, object], said: str) -> None:
    [problem] = problems(servers(**fields))
    assert said in problem and problem.startswith("generator.servers.") and "secret@" not in problem


def test_servers_of_this_machine_may_take_weights_from_memory() -> None:
    assert problems(servers(urls=["http://127.0.0.1:8100", "http://localhost:8101"], transfer="shm")) == []


def test_what_belongs_to_rlpost_and_what_makes_no_sense_is_refused() -> None:
    [own] = problems("generator.options={middleware: mine.Gate}")
    assert own.startswith("generator.options.middleware must not be given")
    [park] = problems("engine.park=optimizer")
    assert park.startswith("engine.park must be none for generator.kind=remote_vllm")


def test_servers_are_for_remote_vllm() -> None:
    recipe, _ = read_tree({}, [*PATHS, servers(replicas=2)], name="test")
    [problem] = server_problems(recipe, 1)
    assert "generator.servers is for generator.kind=remote_vllm (got local_vllm)" in problem


def test_more_gpus_than_the_node_has_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for i in range(4):
        (tmp_path / str(i)).mkdir()
    monkeypatch.setattr(check_servers, "GPUS", tmp_path)
    assert problems(servers(replicas=2), world_size=2) == []
    [problem] = problems(servers(replicas=2, tensor_parallel=2), world_size=2)
    assert "needs 4 GPUs beside those of 2 ranks (this node has 4)" in problem


def test_bounds_are_those_of_other_fields() -> None:
    recipe, _ = read_tree({}, [*PATHS, REMOTE, servers(replicas=0, timeout_s=0.0, restarts=-1)], name="test")
    found = [one for one in check(recipe) if "servers" in one]
    assert found == [
        "generator.servers.replicas must be > 0 (got 0)",
        "generator.servers.timeout_s must be > 0 (got 0.0)",
        "generator.servers.restarts must be >= 0 (got -1)",
    ]
