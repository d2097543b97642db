"""vLLM in the trainer's process: one engine a rank.

The engine starts with dummy weights: until a sync has pushed the policy's, and the canary has proved it, there is
nothing sensible to sample from, so a sync that fails cannot hide behind weights read from disk.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlpost.errors import Preempted, RunError
from rlpost.generate.base import Canary, SyncReport, Whole
from rlpost.generate.vllm_features import loads_in_place, probe
from rlpost.preempt import preemption
from rlpost.types import FinishReason, Request, Rollout, Sampling
from rlpost.weights import Weights, WeightStream

if TYPE_CHECKING:
    from rlpost.engine import Engine
    from rlpost.recipe import GeneratorRecipe, Recipe
    from rlpost.render import Renderer
    from rlpost.world import World

CPU_BLOCK = 32
"""Tokens of a block of keys and values, the least that vLLM has on a CPU. Whole blocks of a prompt are found again;
with its default of 128, each of hundreds of answers works through up to 128 tokens of their prompt anew."""
FINISH: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "repetition": "repetition"}


class LocalVllm:
    """A vLLM engine in this process, fed by the engine that trains."""

    concurrent = False

    def __init__(self, recipe: Recipe, folder: Path, renderer: Renderer, canary: Canary, world: World) -> None:
        self.recipe, self.renderer, self.canary, self.world = recipe.generator, renderer, canary, world
        self.bucket_bytes = recipe.engine.sync_bucket_mib << 20
        self.report = SyncReport()
        self.version: int | None = None
        self._stream: WeightStream | None = None
        self._can_sleep = world.device.type == "cuda" and recipe.generator.sleep_level > 0
        self._asleep = False
        self.llm = start(recipe, folder, renderer.context, world)
        cache = self.llm.llm_engine.vllm_config.cache_config
        self.prompt_block = int(cache.block_size) if cache.enable_prefix_caching else 0
        self._sleep()  # until the first `awake` nothing is generated, and the trainer wants its memory back

    def generate(self, requests: Sequence[Request], sampling: Sampling, whole: Whole | None = None) -> list[Rollout]:
        """All rollouts of all requests; one vLLM call."""
        if not requests:
            return []
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [_params(request, sampling, seeded=self.recipe.seeding == "request") for request in requests]
        made: dict[int, list[Rollout]] = {}
        first = self.llm.request_counter.counter  # vLLM numbers requests on from here
        version = -1 if self.version is None else self.version

        def ended(answers: Any) -> None:
            place = int(answers.request_id) - first
            made[place] = [_rollout(requests[place], one, version, self.renderer) for one in answers.outputs]
            if whole is not None:
                whole(made[place])

        with self._own_dice():
            torch.manual_seed(_call_seed(requests))
            self._answers(prompts, params, ended)
        return [rollout for place in range(len(requests)) for rollout in made[place]]

    def _own_dice(self) -> AbstractContextManager[None]:
        """What vLLM draws changes nothing of what the trainer draws: a run that goes on scores its canary once more."""
        return torch.random.fork_rng(devices=[self.world.device] if self.world.device.type == "cuda" else [])

    def _answers(self, prompts: list[Any], params: list[Any], ended: Callable[[Any], None]) -> None:
        """One vLLM call; between the steps of its engine this rank looks whether it has been asked to leave."""
        engine = self.llm.llm_engine
        with stepping(engine, preemption.poll, ended):
            try:
                self.llm.generate(prompts, params, use_tqdm=False)
            except Preempted:
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
                raise
            except (RuntimeError, MemoryError) as error:
                raise RunError(
                    f"generator: vLLM must answer every prompt, and stopped ({type(error).__name__}: {error}): "
                    "lower generator.max_num_seqs if memory ran out; VLLM_LOGGING_LEVEL=INFO shows its own log"
                ) from error

    @contextmanager
    def awake(self, engine: Engine, version: int) -> Iterator[None]:
        """Push the engine's weights, prove that they arrived, let the body generate, and sleep where possible."""
        with engine.parking.making_room(), self._asleep_after():
            if self._asleep:
                self.llm.wake_up(tags=["weights"])
            if version != self.version or self.recipe.sleep_level == 2:
                self._sync(engine)
                self.version = version
            trainer_T = self.canary.trainer_logp(engine)
            engine.parking.policy_was_sent()
            if self._asleep:
                self.llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            self.canary.compare(trainer_T, self._score(self.canary.token_ids), self.report)
            yield

    @contextmanager
    def _asleep_after(self) -> Iterator[None]:
        """Sleep after the block, also where it fails: what is parked must have room to come back and be saved."""
        try:
            yield
        finally:
            self._sleep()

    def _sleep(self) -> None:
        if self._can_sleep:
            self.llm.sleep(level=self.recipe.sleep_level)
            self._asleep = True

    def _sync(self, engine: Engine) -> None:
        started = time.perf_counter()
        if self._stream is None or self._stream.policy is not engine.deepspeed.module:
            self._stream = WeightStream(engine.deepspeed.module, bucket_bytes=self.bucket_bytes)
        with closing(iter(self._stream)) as weights:  # vLLM may fail here alone: the other ranks wait for this one
            self.llm.collective_rpc(_load, args=(weights,))
        if not self._stream.done:
            raise RunError("generator: vLLM must take every weight of the policy (it stopped early): report this model")
        self.llm.reset_prefix_cache()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.report.num_bytes, self.report.seconds = self._stream.num_bytes, time.perf_counter() - started

    def close(self) -> None:
        """Give back memory and process groups, while the process group of the ranks is still there."""
        self.llm.llm_engine.engine_core.shutdown()

    def _score(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        with self._own_dice():
            [answer] = self.llm.generate([{"prompt_token_ids": list(token_ids)}], params, use_tqdm=False)
        return [table[token].logprob for token, table in zip(token_ids[1:], answer.prompt_logprobs[1:], strict=True)]


class FolderVllm(LocalVllm):
    """A vLLM engine with the weights of its folder, for evaluation alone: there is no trainer, and it never sleeps."""

    def __init__(self, recipe: Recipe, folder: Path, renderer: Renderer, world: World) -> None:
        self.recipe, self.renderer, self.world = recipe.generator, renderer, world
        self.version = 0
        self.llm = start(recipe, folder, renderer.context, world, weights="auto")


@contextmanager
def stepping(engine: Any, before: Callable[[], None], ended: Callable[[Any], None] | None = None) -> Iterator[None]:
    """Call `before` ahead of each step that vLLM's engine takes, and `ended` for each request that is answered.

    Requests stay one batch, and one seed a call.
    """
    step = engine.step

    def watched() -> Any:
        before()
        outputs = step()
        for output in outputs:
            if ended is not None and output.finished:
                ended(output)
        return outputs

    engine.step = watched
    try:
        yield
    finally:
        del engine.step  # the class's own is there again


def _load(worker: Any, weights: Weights) -> None:
    """Take all weights: in place where their layout allows it, else by vLLM's own reload, layer by layer."""
    if not loads_in_place(worker):
        worker.reload_weights(weights_iterator=weights)
    else:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            worker.model_runner.get_model().load_weights(weights)
    repack_head(worker)


def repack_head(worker: Any) -> None:
    """On a CPU vLLM multiplies by a packed copy of the head, which neither way renews where the head is tied."""
    head: Any = getattr(worker.model_runner.get_model(), "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def set_environment(*, on_cpu: bool) -> None:
    """What vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if on_cpu:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling costs more than it gains on a CPU
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer shares these cores


def start(recipe: Recipe, folder: Path, context: int, world: World, *, weights: str = "dummy") -> Any:
    """A `vllm.LLM`, with the trainer's weights to come (`dummy`) or those of the folder (`auto`)."""
    on_cpu = world.device.type == "cpu"
    set_environment(on_cpu=on_cpu)
    from vllm import LLM

    features = probe()
    features.need("reload_from_iterator", "processed_logprobs", use="generator.kind=local_vllm")
    if on_cpu:
        features.need("kv_cache_memory_bytes", use="generator.kv_cache_gib")
    elif recipe.generator.sleep_level:
        features.need("sleep_levels", use=f"generator.sleep_level={recipe.generator.sleep_level}")
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": recipe.model.dtype,
        "hf_overrides": {"head_dtype": recipe.model.head_dtype} if recipe.model.head_dtype else None,
        "load_format": weights,
        "use_tqdm_on_load": False,
        "max_model_len": context,
        "max_num_seqs": recipe.generator.max_num_seqs,
        "enable_chunked_prefill": _in_chunks(recipe.generator, on_cpu=on_cpu),
        "kv_cache_memory_bytes": int(recipe.generator.kv_cache_gib * 2**30) if on_cpu else None,
        "block_size": CPU_BLOCK if on_cpu else None,
        "gpu_memory_utilization": recipe.generator.memory_frac,
        "enforce_eager": on_cpu if recipe.generator.enforce_eager is None else recipe.generator.enforce_eager,
        "enable_sleep_mode": not on_cpu and recipe.generator.sleep_level > 0 and weights == "dummy",
        "logprobs_mode": "processed_logprobs",
        "seed": recipe.seed,
        "disable_log_stats": True,
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    if world.size > 1:
        arguments["distributed_executor_backend"] = "external_launcher"  # this process is already a rank
    try:
        return LLM(**(arguments | recipe.generator.options))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise RunError(_start_failed(error, recipe.generator, on_cpu=on_cpu)) from error


def _in_chunks(recipe: GeneratorRecipe, *, on_cpu: bool) -> bool | None:
    """Whether prompts are worked through in chunks; None: as vLLM likes.

    Of a seeded request vLLM rewinds the dice after each chunk but the last, which it cannot do on a CPU (0.32).
    """
    return False if on_cpu and recipe.seeding == "request" else None


def _start_failed(error: Exception, recipe: GeneratorRecipe, *, on_cpu: bool) -> str:
    reason = " ".join(str(error).split())
    key = f"kv_cache_gib={recipe.kv_cache_gib:g}" if on_cpu else f"memory_frac={recipe.memory_frac:g}"
    if "KV cache" in reason or "cache blocks" in reason or "memory" in reason.lower():
        return (
            f"generator.{key} must leave vLLM room for at least one answer of full length (vLLM: {reason}): raise it, "
            "or lower model.context or sampling.max_new_tokens"
        )
    return f"generator: vLLM could not start ({type(error).__name__}: {reason}): check model and generator.options"


def _params(request: Request, sampling: Sampling, *, seeded: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=request.n,
        seed=request.seed if seeded else None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=request.max_new_tokens(sampling),
        stop_token_ids=list(sampling.stop_ids),
        stop=list(sampling.stop),
        include_stop_str_in_output=bool(sampling.stop),
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        **repetition(sampling.repeats),
    )


def repetition(repeats: Sequence[int] | None) -> dict[str, Any]:
    """Arguments of `SamplingParams` for `Sampling.repeats`; an older vLLM has none, and is asked for none."""
    if repeats is None:
        return {}
    from vllm.sampling_params import RepetitionDetectionParams

    times, longest = repeats
    return {"repetition_detection": RepetitionDetectionParams(max_pattern_size=longest, min_count=times)}


def text_params(n: int, seed: int, sampling: Sampling, *, logprobs: int | None) -> Any:
    """How vLLM draws `n` texts that nothing is trained on: seeded one by one, without log-probs unless asked for."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=list(sampling.stop_ids),
        logprobs=logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _rollout(request: Request, output: Any, version: int, renderer: Renderer) -> Rollout:
    token_ids = tuple(output.token_ids)
    return request.rollout(
        token_ids,
        _chosen_logp(output.logprobs, len(token_ids)),
        finish_reason=FINISH.get(output.finish_reason, "abort"),
        version=version,
        text=renderer.decode(token_ids),
    )


def _chosen_logp(flat: Any, num_tokens: int) -> tuple[float, ...]:
    """Log-prob of each chosen token: the first of the entries that vLLM keeps for a position."""
    return tuple(flat.logprobs[start] for start in flat.start_indices[:num_tokens])


def _call_seed(requests: Sequence[Request]) -> int:
    text = ",".join(f"{request.group}:{request.seed}:{request.n}" for request in requests)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
