"""Trainer -> vLLM: a full sync of the policy's weights, beside a plain copy of the same bytes.

python -m tests.bench.sync --dtype bfloat16 --repeats 5

The model has the shape of SmolLM2-135M and random weights. One rank, as in ZeRO 0 to 2: what is streamed are views. The
two take turns, so that a machine that slows down slows both; medians of the repeats, after one that is not counted.
`repack` is the share of the load that vLLM spends on bringing weights into the layout of its matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from rlpost.__main__ import quiet
from rlpost.generate.base import Canary, canary_tokens
from rlpost.generate.local_vllm import LocalVllm
from rlpost.generate.vllm_features import loads_in_place
from rlpost.policy import Policy, load_policy
from rlpost.recipe import EngineRecipe, GeneratorRecipe, InitModel, Model, Prompting, Recipe
from rlpost.render import Renderer, build_tokenizer
from rlpost.summary import machine, versions
from rlpost.types import Request, Sampling, Task
from rlpost.weights import WeightStream
from rlpost.world import World

TARGET = 3.0
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(dtype=options.dtype, repeats=options.repeats)
    Console().print(rich_table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(*, dtype: str = "bfloat16", repeats: int = 5) -> dict[str, Any]:
    """Median seconds of a sync, of its parts and of plain copies, the speed of a short generation, and versions."""
    world = World().start()
    try:
        with tempfile.TemporaryDirectory() as name:
            policy, generator = start(Path(name), dtype, world)
            try:
                return take_turns(policy, generator, repeats) | {"dtype": dtype}
            finally:
                generator.close()
    finally:
        world.stop()


def start(folder: Path, dtype: str, world: World) -> tuple[Policy, LocalVllm]:
    """A random model of the shape, and a vLLM engine for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = build_tokenizer(InitModel(tokenizer="char", alphabet="abcdefghijklmnopqrstuvwxyz="))
    tokenizer.save_pretrained(folder)
    recipe = Recipe(
        model=Model(path=str(folder), dtype=dtype, context=256),
        engine=EngineRecipe(),
        generator=GeneratorRecipe(kv_cache_gib=0.25, max_num_seqs=16),
    )
    canary = Canary.of(canary_tokens((2, 3, 28), 29), tolerance=1.0, device=world.device)
    generator = LocalVllm(recipe, folder, Renderer(tokenizer, Prompting(), context=256), canary, world)
    return load_policy(folder, recipe.model).to(world.device), generator


def take_turns(policy: Policy, generator: LocalVllm, repeats: int) -> dict[str, Any]:
    """Every way in turn, `repeats` times after a first round."""
    engine: Any = SimpleNamespace(deepspeed=SimpleNamespace(module=policy))
    kept = [tensor.clone() for _, tensor in WeightStream(policy, bucket_bytes=1 << 29)]
    seconds: dict[str, list[float]] = {}
    with repacking() as repacked:
        ways: dict[str, Callable[[], Any]] = {
            "clone": lambda: [tensor.clone() for _, tensor in WeightStream(policy, bucket_bytes=1 << 29)],
            "copy": lambda: [a.copy_(b) for a, (_, b) in zip(kept, WeightStream(policy, bucket_bytes=1 << 29))],  # noqa: B905
            "gather": lambda: list(WeightStream(policy, bucket_bytes=1 << 29)),
            "sync": lambda: generator._sync(engine),
        }
        for turn in range(repeats + 1):
            for name, run in ways.items():
                repacked.clear()
                passed = timed(run, generator.world)
                if turn:
                    seconds.setdefault(name, []).append(passed)
                    if name == "sync":
                        seconds.setdefault("repack", []).append(sum(repacked))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    median["load"] = median["sync"] - median["gather"] - median["repack"]
    return {
        "shape": SHAPE,
        "bytes": generator.report.num_bytes,
        "in_place": generator.llm.collective_rpc(loads_in_place)[0],
        "seconds": seconds,
        "median_s": median,
        "gb_per_s": generator.report.num_bytes / median["sync"] / 1e9,
        "times_a_clone": median["sync"] / median["clone"],
        "times_a_copy": median["sync"] / median["copy"],
        "times_a_clone_without_repack": (median["sync"] - median["repack"]) / median["clone"],
        "generated_tokens_per_s": generation(generator),
        "target": TARGET,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": machine(),
    }


def timed(run: Callable[[], Any], world: World) -> float:
    """Seconds of a call, with the accelerator's queue."""
    started = time.perf_counter()
    run()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def repacking() -> Iterator[list[float]]:
    """A list that gets the seconds of every layer that vLLM packs while the body runs."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    found: list[float] = []

    def counted(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def process(self: Any, layer: Any) -> None:
            started = time.perf_counter()
            original(self, layer)
            found.append(time.perf_counter() - started)

        return process

    name = "process_weights_after_loading"
    kinds = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    first, second = (patch.object(kind, name, counted(getattr(kind, name))) for kind in kinds)
    with first, second:
        yield found


def generation(generator: LocalVllm, *, num_requests: int = 8, num_tokens: int = 16) -> float:
    """Tokens a second of a full batch: what a faster sync must not cost."""
    requests = [Request(i, Task(str(i), "ab="), (2, 3, 28), n=1, seed=i) for i in range(num_requests)]
    sampling = Sampling(max_new_tokens=num_tokens, temperature=1.0, stop_ids=())
    times = [timed(lambda: generator.generate(requests, sampling), generator.world) for _ in range(4)]
    return num_requests * num_tokens / statistics.median(times[1:])


LABELS = {
    "clone": "clone of every tensor",
    "copy": "copy into tensors that are there",
    "sync": "sync",
    "gather": "of it gather",
    "load": "of it vLLM's load",
    "repack": "of it vLLM's repacking",
}


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, median seconds, and these as a multiple of a clone's."""
    median = result["median_s"]
    return [(label, f"{median[name]:.3f}", f"{median[name] / median['clone']:.2f}") for name, label in LABELS.items()]


def summary(result: dict[str, Any]) -> str:
    """What was moved and how fast, in a sentence."""
    way = "written in place" if result["in_place"] else "by reload_weights"
    return (
        f"{result['bytes'] / 1e6:.0f} MB in {result['dtype']}, {result['threads']} threads, {way}: "
        f"{result['gb_per_s']:.2f} GB/s; target: at most {result['target']:g} times a clone; then generation at "
        f"{result['generated_tokens_per_s']:.0f} tokens/s"
    )


def table(result: dict[str, Any]) -> str:
    """The result, as Markdown."""
    lines = ["| | median s | times a clone |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows(result))]
    return "\n".join([*lines, "", summary(result)])


def rich_table(result: dict[str, Any]) -> Table:
    """The result, for a terminal."""
    made = Table("", "median s", "times a clone", title="Weight sync", caption=summary(result))
    for row in rows(result):
        made.add_row(*row)
    return made


if __name__ == "__main__":
    main()
