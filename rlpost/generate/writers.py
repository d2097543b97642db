"""Texts from a model that is not trained here: vLLM on the weights of a folder, or an OpenAI-compatible endpoint.

Requests are handed over as others end, so that there is no batch whose longest answer everything waits for; texts come
in the order in which they are whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlpost.errors import RunError
from rlpost.preempt import preemption
from rlpost.types import Sampling, Task

if TYPE_CHECKING:
    from rlpost.recipe import Recipe
    from rlpost.render import Renderer
    from rlpost.world import World

AHEAD = 2
"""Requests that wait in vLLM for each that it decodes."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `n` texts that follow a task's prompt.

    >>> Ask("a", Task("a", "1+1="), seed=3).n
    1
    """

    id: str
    task: Task
    n: int = 1
    seed: int = 0
    """Text i is drawn with seed + i, whatever else is asked for."""


@dataclass(frozen=True, slots=True)
class Written:
    """One text.

    >>> Written("1+1=2", "stop").finish
    'stop'
    """

    text: str
    finish: str
    """`stop`, `length`, or `too_long` where the prompt alone did not fit."""
    reasoning: str | None = None
    """What a server gave apart from the text."""
    tokens: int = 0
    first: dict[int, float] = field(default_factory=dict)
    """Log-probs of the most probable first tokens, where these were asked for."""


class Writer(Protocol):
    """Whoever writes."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which its texts end; empty where it knows itself."""
        ...

    def stream(self, asks: Iterable[Ask], sampling: Sampling, *, first: int = 0) -> Iterator[tuple[Ask, list[Written]]]:
        """Each request with its texts, as they are whole; `first`: so many log-probs of the first token."""
        ...

    def close(self) -> None:
        """End it, while the ranks' process group is still there."""
        ...


class FrozenVllm:
    """vLLM in this process, with the weights of a model folder."""

    def __init__(self, recipe: Recipe, folder: Path, renderer: Renderer, world: World) -> None:
        from rlpost.generate.local_vllm import start

        options = {"logprobs_mode": "raw_logprobs"} | recipe.generator.options
        generator = replace(recipe.generator, options=options, sleep_level=0, seeding="request")
        self.renderer = renderer
        self.window = AHEAD * generator.max_num_seqs
        self.llm = start(replace(recipe, generator=generator), folder, renderer.context, world, weights="auto")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The model's end tokens."""
        return self.renderer.stop_ids

    def stream(self, asks: Iterable[Ask], sampling: Sampling, *, first: int = 0) -> Iterator[tuple[Ask, list[Written]]]:
        """Keep vLLM filled from `asks`."""
        engine, waiting = self.llm.llm_engine, iter(asks)
        flying: dict[str, Ask] = {}
        more, count = True, 0
        try:
            while more or flying:
                while more and len(flying) < self.window:
                    ask = next(waiting, None)
                    if ask is None:
                        more = False
                    elif len(ids := self.renderer.prompt_ids(ask.task)) >= self.renderer.context:
                        yield ask, [Written("", "too_long")] * ask.n
                    else:
                        name, count = f"w{count}", count + 1
                        engine.add_request(name, {"prompt_token_ids": list(ids)}, _params(ask, sampling, first))
                        flying[name] = ask
                for answer in engine.step() if flying else ():
                    if answer.finished:
                        yield flying.pop(answer.request_id), [self._written(one) for one in answer.outputs]
                preemption.poll()
        finally:
            if flying:
                engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def close(self) -> None:
        """Give back memory and process groups."""
        self.llm.llm_engine.engine_core.shutdown()

    def _written(self, output: Any) -> Written:
        ids = tuple(output.token_ids)
        first = {token: entry.logprob for token, entry in output.logprobs[0].items()} if output.logprobs else {}
        finish = "stop" if output.finish_reason == "stop" else "length"
        return Written(self.renderer.decode(ids), finish, tokens=len(ids), first=first)


def _params(ask: Ask, sampling: Sampling, first: int) -> Any:
    from rlpost.generate.local_vllm import text_params

    return text_params(ask.n, ask.seed, sampling, logprobs=first or None)


class Endpoint:
    """A chat model behind an OpenAI-compatible server; its key, if it wants one, is in OPENAI_API_KEY."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, url: str, model: str, *, at_once: int = 64, timeout_s: float = 3600.0) -> None:
        import openai

        self.url, self.model, self.at_once = url, model, at_once
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=5)

    def stream(self, asks: Iterable[Ask], sampling: Sampling, *, first: int = 0) -> Iterator[tuple[Ask, list[Written]]]:
        """`at_once` requests at a time."""
        if first:
            raise RunError("synth: log-probs of a first token are not asked of an endpoint: name a local model")
        waiting = iter(asks)
        pool = ThreadPoolExecutor(self.at_once)
        flying: dict[Future[list[Written]], Ask] = {}
        try:
            while True:
                while len(flying) < self.at_once and (ask := next(waiting, None)) is not None:
                    flying[pool.submit(self._one, ask, sampling)] = ask
                if not flying:
                    return
                for done in wait(flying, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    yield flying.pop(done), done.result()
                preemption.poll()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close its connections."""
        self.client.close()

    def _one(self, ask: Ask, sampling: Sampling) -> list[Written]:
        import openai

        prompt = ask.task.prompt
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        more = {"top_k": sampling.top_k} if sampling.top_k else {}
        try:
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                n=ask.n,
                seed=ask.seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                extra_body=more,
            )
        except openai.OpenAIError as error:
            raise RunError(
                f"the endpoint {self.url} must answer chat requests for {self.model} ({error}): what is written "
                "so far stays, and the same command goes on with the rest"
            ) from error
        return [_said(choice) for choice in answer.choices]


def _said(choice: Any) -> Written:
    message = choice.message
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return Written(message.content or "", choice.finish_reason or "stop", reasoning)
