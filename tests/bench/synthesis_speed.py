"""Speed of synthesis: filters without a model, in items a second of one core; generation beside vLLM called directly.

    python -m tests.bench.synthesis_speed
    python -m tests.bench.synthesis_speed --items 20000 --only filters

The direct call has the same requests, seeds and settings in the same engine, all at once; order alternates.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlpost.recipe import Recipe, load
from rlpost.synth.bench import Bench
from rlpost.synth.pipeline import Stage, run_stage, stages_of
from rlpost.synth.store import Part

RECIPE = "recipes/scalediff_testbed.yaml"
WORDS = [f"w{i}" for i in range(3000)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10000)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["filters", "generation"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-synthesis-speed.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.only != "generation":
        result["filters"] = filters(options.items)
        for name, rate in result["filters"].items():
            print(f"{name}: {rate:,.0f} items/s of processor time", flush=True)
    if options.only != "filters":
        result["generation"] = generation(options.requests, options.repeats)
        for name, one in result["generation"].items():
            print(f"{name}: {one['ours']:,.0f} tokens/s, vLLM directly {one['direct']:,.0f}: {one['ratio']:.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def filters(items: int) -> dict[str, float]:
    """Each filter without a model on word problems of 40 words with solutions of 200, by `run_stage`; and all."""
    filters = [
        "synth.screen=[{use: rules}, {use: near_duplicates}]",
        "synth.filters=[{use: solution_rules}, {use: agreement}]",
    ]
    with tempfile.TemporaryDirectory() as place:
        recipe = load(RECIPE, [*filters, f"run_dir={place}", "name=speed"])
        bench = Bench(recipe, None, Path(place) / "speed" / "synth")
        stages = stages_of(recipe)
        for stage in stages:
            if stage.name == "sample":
                filled(bench, stage, problems(items))
            if stage.name == "distil":
                filled(bench, stage, solved(items))
        seconds = {stage.name: timed(stage, recipe, bench) for stage in stages if stage.is_filter}
    return {name: items / s for name, s in seconds.items()} | {"all of them": items / sum(seconds.values())}


def problems(items: int) -> Iterator[dict[str, Any]]:
    """Different problems of 40 words."""
    dice = random.Random(0)
    for i in range(items):
        yield {"id": f"p-{i:06d}", "prompt": " ".join(dice.choices(WORDS, k=40)), "seed": i, "finish": "stop"}


def solved(items: int) -> Iterator[dict[str, Any]]:
    """The same with four solutions of 200 words."""
    dice = random.Random(1)
    for row in problems(items):
        text = " ".join(dice.choices(WORDS, k=200))
        one = {"reasoning": "", "text": text, "answer": str(dice.randrange(10000)), "finish": "stop"}
        yield {**row, "solutions": [one] * 4}


def filled(bench: Bench, stage: Stage, rows: Iterator[dict[str, Any]]) -> None:
    """A stage's file with these rows."""
    part = Part(bench.folder / stage.name)
    part.open({"stage": stage.name})
    part.finish(part.write(rows), 0.0)


def timed(stage: Stage, recipe: Recipe, bench: Bench) -> float:
    """Seconds of this process in a stage, with its reading and writing; other work on the machine does not count."""
    started = time.process_time()
    run_stage(stage, recipe, bench)
    return time.process_time() - started


def generation(requests: int, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens a second through the writer and by one call of vLLM, for one text a problem and for four."""
    import os

    from rlpost.__main__ import with_world
    from rlpost.world import World

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        init = (
            "model.init={tokenizer: char, alphabet: '0123456789+-=;#', hidden_size: 256, num_layers: 4, num_heads: 4}"
        )
        recipe = load(RECIPE, [f"run_dir={place}", "sft=null", init, "model.context=160"])

        def run(world: World) -> None:
            bench = Bench(recipe, world, Path(place))
            writer = bench.local("policy")
            for n in (1, 4):
                found[f"{n} a prompt"] = beside(writer, requests, n, repeats)
            bench.close()

        with_world(run, World())
    return found


def beside(writer: Any, requests: int, n: int, repeats: int) -> dict[str, float]:
    """Medians of both ways; the first pair warms up. On a CPU seconds are the processor's: other work hardly counts."""
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    from rlpost.generate.local_vllm import text_params
    from rlpost.generate.writers import Ask
    from rlpost.types import Sampling, Task

    sampling = Sampling(96, stop_ids=writer.stop_ids)
    tasks = [Task(str(i), f"{i % 10}+{i // 10 % 10}-{i // 100}=") for i in range(requests)]

    def ours() -> int:
        asks = (Ask(task.key, task, n, seed=i * n) for i, task in enumerate(tasks))
        return sum(one.tokens for _, texts in writer.stream(asks, sampling) for one in texts)

    def direct() -> int:
        prompts = [{"prompt_token_ids": list(writer.renderer.prompt_ids(task))} for task in tasks]
        params = [text_params(n, i * n, sampling, logprobs=None) for i in range(requests)]
        answers = writer.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.token_ids) for answer in answers for one in answer.outputs)

    rates: dict[str, list[float]] = {"ours": [], "direct": []}
    for turn in range(repeats + 1):
        for name, way in (("ours", ours), ("direct", direct))[:: 1 if turn % 2 else -1]:
            started = now()
            tokens = way()
            if turn:
                rates[name].append(tokens / (now() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return medians | {"ratio": medians["ours"] / medians["direct"]}


if __name__ == "__main__":
    main()
