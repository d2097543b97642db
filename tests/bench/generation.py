"""Generation through rlpost, next to the same requests given to vLLM directly, in the same engine.

    python -m tests.bench.generation [recipes/quickstart.yaml] [key=value ...]

A and B alternate, so that a machine that slows down slows both. Both draw with the same seed and must return the same
tokens. `direct` is what a person would write: `LLM.generate` with log-probs and text. `lean` is `LLM.generate` with
rlpost's own sampling parameters (no text, flat log-probs): the most that the engine gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlpost.__main__ import quiet
from rlpost.check import load_and_check
from rlpost.collect import request_seed
from rlpost.generate.local_vllm import LocalVllm, _call_seed, _params
from rlpost.model_source import model_folder
from rlpost.recipe import Recipe
from rlpost.run import make_engines, make_generator, make_renderer, training_sampling
from rlpost.summary import machine, versions
from rlpost.tasks import load_task_sets
from rlpost.types import Request, Sampling
from rlpost.world import World

TARGET = 0.90


def main() -> None:
    """Measure, print a table, write `generation.json`."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-generation/generation.json"))
    options = parser.parse_args()
    recipe = load_and_check(options.recipe, options.overrides)
    world = World().start()
    try:
        result = measure(recipe, world, options.rounds)
    finally:
        world.stop()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def measure(recipe: Recipe, world: World, rounds: int) -> dict[str, Any]:
    """Median seconds of each way, over alternating rounds after one that is not counted."""
    tasks, _ = load_task_sets(recipe)
    folder = model_folder(recipe, world)
    renderer = make_renderer(recipe, folder)
    sampling = training_sampling(recipe, tasks, renderer)
    engine, *_ = make_engines(recipe, folder, world)
    generator = make_generator(recipe, folder, renderer, tasks[0], engine)
    assert isinstance(generator, LocalVllm)
    requests = [
        Request(i, task, renderer.prompt_ids(task), recipe.sampling.group_size, request_seed(recipe.seed, i))
        for i, task in enumerate(tasks[: recipe.prompts_per_step])
    ]
    ways: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "rlpost": lambda: [rollout.token_ids for rollout in generator.generate(requests, sampling)],
        "direct": lambda: direct(generator, requests, plain_params(requests, sampling)),
        "lean": lambda: direct(generator, requests, [_params(one, sampling, seeded=False) for one in requests]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with generator.awake(engine, 0):
        for _ in range(rounds + 1):
            tokens = {}
            for name, generate in ways.items():
                started = time.perf_counter()
                tokens[name] = generate()
                seconds[name].append(time.perf_counter() - started)
            assert tokens["rlpost"] == tokens["direct"] == tokens["lean"], "the same seed must give the same tokens"
    generator.close()
    return report(recipe, {name: times[1:] for name, times in seconds.items()}, sum(map(len, tokens["rlpost"])))


def plain_params(requests: Sequence[Request], sampling: Sampling) -> list[Any]:
    """Sampling parameters as vLLM's documentation has them, with the log-probs that training needs."""
    from vllm import SamplingParams

    shared: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "logprobs": 0,
    }
    return [SamplingParams(n=request.n, **shared) for request in requests]


def direct(generator: LocalVllm, requests: Sequence[Request], params: list[Any]) -> list[tuple[int, ...]]:
    """The tokens of every answer, from `LLM.generate` itself."""
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    with torch.random.fork_rng():
        torch.manual_seed(_call_seed(requests))
        outputs = generator.llm.generate(prompts, params, use_tqdm=False)
    return [tuple(answer.token_ids) for output in outputs for answer in output.outputs]


def report(recipe: Recipe, seconds: dict[str, list[float]], num_tokens: int) -> dict[str, Any]:
    """Medians, and rlpost's speed as a share of each direct way's."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "recipe": recipe.name,
        "prompts": recipe.prompts_per_step,
        "samples_a_prompt": recipe.sampling.group_size,
        "tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": {name: num_tokens / one for name, one in median.items()},
        "speed_frac": {name: median[name] / median["rlpost"] for name in ("direct", "lean")},
        "target": TARGET,
        "versions": versions(),
        "machine": machine(),
    }


def table(result: dict[str, Any]) -> str:
    """The result, to read."""
    lines = [
        f"{result['recipe']}: {result['prompts']} prompts x {result['samples_a_prompt']}, {result['tokens']} tokens",
        f"{'way':<8}{'tokens/s':>10}{'median s':>10}{'rlpost is':>11}",
    ]
    for name, times in result["seconds"].items():
        share = f"{result['speed_frac'][name]:.1%}" if name in result["speed_frac"] else ""
        lines.append(f"{name:<8}{result['tokens_per_s'][name]:>10.0f}{statistics.median(times):>10.3f}{share:>11}")
    return "\n".join([*lines, f"target: at least {result['target']:.0%} of direct"])


if __name__ == "__main__":
    main()
