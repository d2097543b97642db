"""The middleware of a vLLM server, in front of a small engine that writes what it is told to."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rlpost.generate import server_gate
from rlpost.generate.server_gate import KEY, Gate

HEADERS = {"Authorization": "Bearer of-the-test"}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_token_ids": [1], "repeats": [3, 2]}


class Queue:
    def __init__(self, request_id: str, token: int, engine: Engine) -> None:
        self.request_id, self.token, self.engine = request_id, token, engine

    async def get(self) -> Any:
        await self.engine.writes.wait()
        flat = SimpleNamespace(logprobs=[-0.5, -0.25], start_indices=[0, 1])
        output = SimpleNamespace(token_ids=[self.token, 1], logprobs=flat, finish_reason="stop")
        return SimpleNamespace(finished=True, outputs=[output])


class Engine:
    """What the gate asks of vLLM's AsyncLLM."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.params: list[Any] = []
        self.writes = asyncio.Event()
        self.writes.set()
        self.breaks = False
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=2, data_parallel_size=1),
            cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True),
        )

    async def is_paused(self) -> bool:
        if self.breaks:
            raise RuntimeError("engine dead")
        return False

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(("pause", mode))

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def collective_rpc(self, name: str, args: tuple[int, ...]) -> None:
        self.calls.append((name, *args))

    async def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> Queue:
        if not prompt["prompt_token_ids"]:
            raise ValueError("The prompt is empty")
        self.calls.append(prompt["prompt_token_ids"])
        self.params.append(params)
        return Queue(name, 5, self)

    async def abort(self, ids: list[str], internal: bool) -> None:
        self.calls.append(("abort", len(ids)))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv(KEY, "of-the-test")
    monkeypatch.setattr(server_gate, "BEAT_S", 0.05)
    return Gate(None)


def client(gate: Gate, engine: Engine) -> httpx.AsyncClient:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
        await gate(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", headers=HEADERS)


def asked(*prompts: list[int], version: int = 3, seed: int | None = 9) -> dict[str, Any]:
    rollouts = [[place, [], None, 8] for place in range(len(prompts))]
    return {"prompts": prompts, "rollouts": rollouts, "sampling": SAMPLING, "version": version, "seed": seed}


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(text) for text in response.text.splitlines()]


def test_without_a_key_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ValueError, match="RLPOST_SERVER_KEY must be set"):
        Gate(None)


def test_every_route_wants_the_key(gate: Gate) -> None:
    async def use() -> None:
        async with client(gate, Engine()) as http:
            for headers in ({"Authorization": "Bearer other"}, {"Authorization": ""}):
                assert (await http.get("/rlpost/state", headers=headers)).status_code == 401
                assert (await http.post("/update_weights", headers=headers)).status_code == 401
            state = (await http.get("/rlpost/state")).json()
            assert (state["version"], state["open"], state["block"], state["workers"]) == (None, False, 16, 2)

    asyncio.run(use())


def test_rollouts_wait_for_the_gate_and_enter_together_in_order_after_the_dice(gate: Gate) -> None:
    async def use() -> None:
        engine = Engine()
        async with client(gate, engine) as http:
            answer = asyncio.create_task(http.post("/rlpost/generate", json=asked([2, 3], [4])))
            await asyncio.sleep(0.2)
            assert engine.calls == []  # shut
            await http.post("/rlpost/open", json={"version": 2})
            await asyncio.sleep(0.2)
            assert engine.calls == []  # open with weights that are too old
            await http.post("/rlpost/open", json={"version": 3})
            told = [line for line in lines(await answer) if line]
        assert engine.calls == [("pause", "keep"), ("rlpost_seed", 9), [2, 3], [4], "resume"]
        assert told[0] == {"entered": 3} and told[-1] == {"end": 2}
        own = {"tokens": [5, 1], "logp": [-0.5, -0.25], "finish": "stop", "spans": [[0, 3]]}
        assert told[1:-1] == [{"place": 0} | own, {"place": 1} | own]
        assert {} in lines(await answer)  # it was heard of while it waited

    asyncio.run(use())


def test_every_rollout_of_a_call_is_drawn_in_the_same_way(gate: Gate) -> None:
    async def use() -> None:
        engine = Engine()
        async with client(gate, engine) as http:
            await http.post("/rlpost/open", json={"version": 3})
            await http.post("/rlpost/generate", json=asked([2], [3], [4]))
        found = [one.repetition_detection for one in engine.params]
        assert [(one.max_pattern_size, one.min_count) for one in found] == [(2, 3)] * 3
        assert {one.max_tokens for one in engine.params} == {8}

    asyncio.run(use())


def test_what_cannot_be_answered_is_said_and_what_had_entered_is_taken_back(gate: Gate) -> None:
    async def use() -> None:
        engine = Engine()
        async with client(gate, engine) as http:
            await http.post("/rlpost/open", json={"version": 3})
            told = lines(await http.post("/rlpost/generate", json=asked([2], [])))
        assert told[-1] == {"error": "ValueError: The prompt is empty"}
        assert engine.calls[-2:] == ["resume", ("abort", 1)] and gate.busy == 0

    asyncio.run(use())


def test_an_engine_that_does_not_work_any_more_ends_the_answer(gate: Gate) -> None:
    async def use() -> None:
        engine = Engine()
        engine.writes.clear()
        async with client(gate, engine) as http:
            await http.post("/rlpost/open", json={"version": 3})
            engine.breaks = True
            with pytest.raises(RuntimeError, match="engine dead"):
                await http.post("/rlpost/generate", json=asked([2]))
        assert ("abort", 1) in engine.calls and gate.busy == 0

    asyncio.run(use())


def test_closing_waits_for_an_engine_that_is_busy_and_may_be_repeated(gate: Gate) -> None:
    async def use() -> None:
        engine, ends = Engine(), asyncio.Event()

        async def pause(*, mode: str, clear_cache: bool) -> None:
            engine.calls.append(("pause", mode))
            await ends.wait()

        engine.pause_generation = pause  # type: ignore[method-assign]
        async with client(gate, engine) as http:
            await http.post("/rlpost/open", json={"version": 3})
            told = [(await http.post("/rlpost/close", json={"mode": "wait"})).json()["paused"]]
            assert not gate.is_open.is_set()
            ends.set()
            told.append((await http.post("/rlpost/close", json={"mode": "wait"})).json()["paused"])
        assert told == [False, True] and engine.calls == [("pause", "wait")]

    asyncio.run(use())
