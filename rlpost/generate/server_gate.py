"""What a vLLM server needs to serve a trainer, as a middleware: `--middleware rlpost.generate.server_gate.Gate`.

The gate asks for the key on every route but /health. It is shut until a trainer has given the server its weights and
opens it, and shut while they are changed: no token is drawn from anything else, and each says which version drew it.
The rollouts of one call enter vLLM together and in order, so that the same call gives the same batches.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

KEY = "RLPOST_SERVER_KEY"
BEAT_S = 1.0
"""While nothing is whole, a line is sent so often, after vLLM's engine has answered."""
CLOSE_S = 1.0
"""How long one call of `close` waits for the engine."""
FREE = ("/health", "/ping")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """The middleware; one a server, whose state it is."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.key = os.environ.get(KEY, "")
        if not self.key:
            raise ValueError(f"{KEY} must be set for a server: without it anybody could change its weights")
        self.boot = uuid.uuid4().hex
        self.version: int | None = None
        self.is_open = asyncio.Event()
        self.adding = asyncio.Lock()
        self.busy = 0
        self._pausing: asyncio.Task[None] | None = None
        self.routes: dict[str, Callable[[Any, Request], Awaitable[Response]]] = {
            "/rlpost/state": self.state,
            "/rlpost/close": self.close,
            "/rlpost/score": self.score,
            "/rlpost/open": self.open,
            "/rlpost/generate": self.generate,
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Ask for the key, then answer a route of this project's or hand on to vLLM."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in FREE:
            await self.app(scope, receive, send)
        elif not self._knows(scope):
            await JSONResponse({"error": f"the key of {KEY} is wanted"}, 401)(scope, receive, send)
        elif scope["path"] in self.routes:
            answer = await self.routes[scope["path"]](scope["app"].state.engine_client, Request(scope, receive))
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _knows(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())

    async def state(self, engine: Any, request: Request) -> Response:
        """Whether it is open, and with which weights; only an engine that works lets this answer."""
        await engine.is_paused()
        parallel, cache = engine.vllm_config.parallel_config, engine.vllm_config.cache_config
        return JSONResponse(
            {
                "boot": self.boot,
                "version": self.version,
                "open": self.is_open.is_set(),
                "busy": self.busy,
                "block": int(cache.block_size) if cache.enable_prefix_caching else 0,
                "workers": parallel.world_size * parallel.data_parallel_size,
            }
        )

    async def close(self, engine: Any, request: Request) -> Response:
        """Shut the gate and pause the engine; `paused` is false where that takes longer, and the call is repeated."""
        mode = (await request.json())["mode"]
        self.is_open.clear()
        if self._pausing is None:
            self._pausing = asyncio.create_task(self._pause(engine, mode))
        await asyncio.wait([self._pausing], timeout=CLOSE_S)
        if not self._pausing.done():
            return JSONResponse({"paused": False})
        paused, self._pausing = self._pausing, None
        paused.result()
        return JSONResponse({"paused": True})

    async def _pause(self, engine: Any, mode: str) -> None:
        async with self.adding:  # what has begun to enter is in
            await engine.pause_generation(mode=mode, clear_cache=mode != "keep")

    async def score(self, engine: Any, request: Request) -> Response:
        """Log-probs of each token but the first, by the weights as they are now; nothing of others is remembered."""
        from vllm import SamplingParams

        token_ids = (await request.json())["token_ids"]
        shut = not self.is_open.is_set()
        await engine.reset_prefix_cache(reset_running_requests=shut)  # an open one may be busy: that changes nothing
        if shut:
            await engine.resume_generation()
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": token_ids}
        async for answer in engine.generate(prompt, params, f"canary-{uuid.uuid4().hex}"):
            found = answer
        pairs = zip(token_ids[1:], found.prompt_logprobs[1:], strict=True)
        return JSONResponse({"logp": [table[token].logprob for token, table in pairs]})

    async def open(self, engine: Any, request: Request) -> Response:
        """The weights have been proved: let rollouts in."""
        self.version = int((await request.json())["version"])
        self.is_open.set()
        return JSONResponse({"version": self.version})

    async def generate(self, engine: Any, request: Request) -> Response:
        """Rollouts, a line of JSON each as it ends; an empty line of JSON says that the engine is alive."""
        return StreamingResponse(self._lines(engine, await request.json()), media_type="application/x-ndjson")

    async def _lines(self, engine: Any, asked: dict[str, Any]) -> AsyncIterator[str]:
        made: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        work = asyncio.create_task(self._work(engine, asked, made))
        try:
            line: dict[str, Any] = {}
            while "end" not in line and "error" not in line:
                try:
                    line = await asyncio.wait_for(made.get(), BEAT_S)
                except TimeoutError:
                    if work.done():
                        work.result()
                    await engine.is_paused()
                    line = {}
                yield json.dumps(line) + "\n"
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _work(self, engine: Any, asked: dict[str, Any], made: asyncio.Queue[dict[str, Any]]) -> None:
        flying: dict[int, Any] = {}
        try:
            version = await self._enter(engine, asked, flying)
            made.put_nowait({"entered": version})
            await asyncio.gather(*(_answer(place, one, version, made) for place, one in list(flying.items())))
            await made.put({"end": len(flying)})
            flying.clear()
        except (ValueError, TypeError, KeyError) as error:  # of the request, which no other server could answer
            await made.put({"error": f"{type(error).__name__}: {error}"})
        finally:
            self.busy -= len(asked["rollouts"]) if "entered" in asked else 0
            if flying:
                await engine.abort([one.request_id for one in flying.values()], internal=True)

    async def _enter(self, engine: Any, asked: dict[str, Any], flying: dict[int, Any]) -> int:
        """Wait for the gate and for weights that are new enough, and let all rollouts in at once; their version."""
        while True:
            await self.is_open.wait()
            async with self.adding:
                if self.is_open.is_set() and self.version is not None and self.version >= asked["version"]:
                    await self._add(engine, asked, flying)
                    return self.version
            await asyncio.sleep(BEAT_S / 20)

    async def _add(self, engine: Any, asked: dict[str, Any], flying: dict[int, Any]) -> None:
        self.busy += len(asked["rollouts"])
        asked["entered"] = True
        await engine.pause_generation(mode="keep", clear_cache=False)
        try:
            if asked["seed"] is not None:
                await engine.collective_rpc("rlpost_seed", args=(asked["seed"],))
            name = uuid.uuid4().hex
            for place, (prompt, begun, seed, max_tokens) in enumerate(asked["rollouts"]):
                ids = {"prompt_token_ids": [*asked["prompts"][prompt], *begun]}
                params = _params(dict(asked["sampling"]), seed, max_tokens)
                flying[place] = await engine.add_request(f"{name}-{place}", ids, params)
        finally:
            await engine.resume_generation()


async def _answer(place: int, queue: Any, version: int, made: asyncio.Queue[dict[str, Any]]) -> None:
    """One rollout to its end."""
    answer = await queue.get()
    while not answer.finished:
        answer = await queue.get()
    [output] = answer.outputs
    token_ids = list(output.token_ids)
    flat = output.logprobs
    logp = [flat.logprobs[start] for start in flat.start_indices[: len(token_ids)]] if token_ids else []
    spans = getattr(output, "weight_versions", None)  # of a rollout that went on under other weights
    known = [[span.start, int(span.version)] for span in spans or () if span.version.isdecimal()]
    made.put_nowait(
        {
            "place": place,
            "tokens": token_ids,
            "logp": logp,
            "finish": output.finish_reason,
            "spans": known or [[0, version]],
        }
    )


def _params(sampling: dict[str, Any], seed: int | None, max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from rlpost.generate.local_vllm import repetition

    repeats = sampling.get("repeats")
    return SamplingParams(
        **{name: value for name, value in sampling.items() if name != "repeats"},
        **repetition(repeats),
        seed=seed,
        max_tokens=max_tokens,
        logprobs=0,
        flat_logprobs=True,
        detokenize="stop" in sampling,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class Dice:
    """What `--worker-extension-cls` adds to each worker of a server."""

    def rlpost_seed(self, seed: int) -> None:
        """Draw what is not seeded by itself from here on anew."""
        import torch

        torch.manual_seed(seed)
