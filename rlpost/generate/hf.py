"""Sampling with plain transformers from the very module that is trained: slow, and the reference for the others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlpost.generate.base import Canary, SyncReport, Whole, circles
from rlpost.preempt import preemption
from rlpost.stop_texts import first_stop
from rlpost.types import FinishReason, Request, Rollout, Sampling
from rlpost.weights import WeightStream

if TYPE_CHECKING:
    from rlpost.engine import Engine
    from rlpost.recipe import Recipe
    from rlpost.render import Renderer
    from rlpost.world import World


class HfGenerator:
    """A second copy of the model, given the trained weights at every sync, sampling one request at a time."""

    prompt_block = 0
    concurrent = False

    def __init__(self, recipe: Recipe, renderer: Renderer, canary: Canary, world: World) -> None:
        self.renderer, self.canary, self.world = renderer, canary, world
        self.bucket_bytes = recipe.engine.sync_bucket_mib << 20
        self.report = SyncReport()
        self.version: int | None = None
        self.model: Any = None

    def generate(self, requests: Sequence[Request], sampling: Sampling, whole: Whole | None = None) -> list[Rollout]:
        """All rollouts of all requests."""
        rollouts = []
        for request in requests:
            found = self._one(request, sampling)
            if whole is not None:
                whole(found)
            rollouts += found
        return rollouts

    @contextmanager
    def awake(self, engine: Engine, version: int) -> Iterator[None]:
        """Copy the engine's weights, prove that they arrived, and let the body generate."""
        with engine.parking.making_room():
            if version != self.version:
                self._sync(engine)
                self.version = version
            trainer_T = self.canary.trainer_logp(engine)
            engine.parking.policy_was_sent()
            self.canary.compare(trainer_T, self._score(), self.report)
            yield

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    def _sync(self, engine: Engine) -> None:
        trained = engine.deepspeed.module.model
        if self.model is None:
            gpus = [self.world.device] if self.world.device.type == "cuda" else []
            with torch.random.fork_rng(devices=gpus):  # a run that goes on makes it once more
                self.model = type(trained)(trained.config).to(self.world.device).eval()
            for param in self.model.parameters():  # and no buffer: rotary frequencies stay in float32
                param.data = param.data.to(trained.dtype)
        started = time.perf_counter()
        stream = WeightStream(engine.deepspeed.module, bucket_bytes=self.bucket_bytes)
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in stream:
                own[name].copy_(tensor)
        self.report.num_bytes, self.report.seconds = stream.num_bytes, time.perf_counter() - started

    @torch.no_grad()
    def _score(self) -> list[float]:
        micro = self.canary.micro
        logits_TV = self.model(input_ids=micro.tokens_BT).logits[0, :-1].float()
        return torch.log_softmax(logits_TV, -1).gather(-1, micro.tokens_BT[0, 1:, None]).squeeze(-1).tolist()

    @torch.no_grad()
    def _one(self, request: Request, sampling: Sampling) -> list[Rollout]:
        device = self.world.device
        dice = torch.Generator(device=device).manual_seed(request.seed)
        stop = torch.tensor(sampling.stop_ids, device=device)
        step_NT = torch.tensor([request.prompt_ids] * request.n, device=device)
        cache: Any = None
        tokens: list[Tensor] = []
        logps: list[Tensor] = []
        alive_N = torch.ones(request.n, dtype=torch.bool, device=device)
        while len(tokens) < request.max_new_tokens(sampling) and alive_N.any():
            preemption.poll()
            answer = self.model(input_ids=step_NT, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            logp_NV = processed_logp(answer.logits[:, -1].float(), sampling)
            token_N = torch.multinomial(logp_NV.exp(), 1, generator=dice)
            tokens.append(token_N.squeeze(-1))
            logps.append(logp_NV.gather(-1, token_N).squeeze(-1))
            alive_N &= ~torch.isin(tokens[-1], stop)
            if sampling.stop:
                alive_N &= ~self._has_stop(tokens, alive_N, sampling.stop)
            if sampling.repeats is not None:
                alive_N &= ~torch.tensor([circles(row, *sampling.repeats) for row in torch.stack(tokens, -1).tolist()])
            step_NT = token_N
        token_NT, logp_NT = torch.stack(tokens, -1).tolist(), torch.stack(logps, -1).tolist()
        return [self._rollout(request, ids, logp, sampling) for ids, logp in zip(token_NT, logp_NT, strict=True)]

    def _has_stop(self, tokens: Sequence[Tensor], alive_N: Tensor, stop: Sequence[str]) -> Tensor:
        """Which of the rows that go on have one of these texts in theirs."""
        found_N = torch.zeros_like(alive_N)
        for i in alive_N.nonzero().squeeze(-1).tolist():
            text = self.renderer.decode([int(token_N[i]) for token_N in tokens])
            found_N[i] = any(one in text for one in stop)
        return found_N

    def _rollout(self, request: Request, ids: list[int], logp: list[float], sampling: Sampling) -> Rollout:
        end, reason = ended(ids, sampling, limit=request.max_new_tokens(sampling))
        if (stopped := first_stop(ids[:end], sampling.stop, self.renderer.decode)) is not None:
            end, reason = stopped[0], "stop"
        return request.rollout(
            ids[:end],
            logp[:end],
            finish_reason=reason,
            version=-1 if self.version is None else self.version,
            text=self.renderer.decode(ids[:end]),
        )


def ended(ids: Sequence[int], sampling: Sampling, *, limit: int) -> tuple[int, FinishReason]:
    """How many of the tokens that a row was given belong to its answer, and why that ended; the limit comes first.

    >>> ended([5, 1, 7], Sampling(3, stop_ids=(1,)), limit=3), ended([5, 5], Sampling(3, repeats=(2, 1)), limit=3)
    ((2, 'stop'), (2, 'repetition'))
    """
    for i, token in enumerate(ids, 1):
        if token in sampling.stop_ids:
            return i, "stop"
        if sampling.repeats is not None and i < limit and circles(ids[:i], *sampling.repeats):
            return i, "repetition"
    return len(ids), "length"


class FolderHf(HfGenerator):
    """Plain transformers with the weights of a folder, for evaluation alone: there is no trainer."""

    def __init__(self, recipe: Recipe, folder: Path, renderer: Renderer, world: World) -> None:
        from rlpost.policy import load_policy

        self.renderer, self.world, self.version = renderer, world, 0
        self.model = load_policy(folder, replace(recipe.model, lora=None)).model.to(world.device).eval()


def processed_logp(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs of the distribution that is sampled from: temperature, then top-k, then top-p, renormalised.

    Temperature 0 is the greedy choice.
    """
    if not sampling.temperature:
        return torch.zeros_like(logits_NV).scatter(-1, logits_NV.argmax(-1, keepdim=True), 1.0).log()
    logits_NV = logits_NV / sampling.temperature
    if sampling.top_k:
        kth_N1 = logits_NV.topk(min(sampling.top_k, logits_NV.shape[-1])).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < kth_N1, -torch.inf)
    if sampling.top_p < 1.0:
        sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True)
        before_NV = torch.softmax(sorted_NV, -1).cumsum(-1) - torch.softmax(sorted_NV, -1)
        out_NV = torch.zeros_like(logits_NV, dtype=torch.bool).scatter(-1, order_NV, before_NV >= sampling.top_p)
        logits_NV = logits_NV.masked_fill(out_NV, -torch.inf)
    return torch.log_softmax(logits_NV, dim=-1)
