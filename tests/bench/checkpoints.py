"""What a checkpoint costs against the size of the model: how long training stops, how long the writing takes, resuming.

    python -m tests.bench.checkpoints [--millions 5 25 100] [--out runs/checkpoints]

One rank, float32, ZeRO-2: 12 bytes a parameter (weights and two moments). `stopped`: until `save` returns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from rlpost.checkpoint import Checkpoints
from rlpost.engine import Engine
from rlpost.policy import Policy
from rlpost.recipe import EngineRecipe
from rlpost.world import World

REPEATS = 3
SHAPES = {5: (256, 4), 25: (512, 6), 100: (1024, 6), 400: (1536, 12)}
"""Millions of parameters: hidden size and layers of a Llama with 4096 tokens."""


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=list(SHAPES), default=[5, 25, 100])
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoints"))
    options = parser.parse_args()
    world = World().start()
    found = [measure(millions, options.out, world) for millions in options.millions]
    world.stop()
    (options.out / "checkpoints.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


def measure(millions: int, out: Path, world: World) -> dict[str, Any]:
    """Median seconds of each part, of a few saves of an engine that has taken a step."""
    shutil.rmtree(out / str(millions), ignore_errors=True)
    engine = make_engine(millions, world)
    checkpoints = Checkpoints(out / str(millions), world, keep=1, background=world.apart())
    rows = []
    for step in range(1, REPEATS + 1):
        seconds = {}
        started = time.perf_counter()
        checkpoints.save(step, engine, {}, wait=False)
        seconds["stopped"] = time.perf_counter() - started
        checkpoints.wait()
        seconds["written"] = time.perf_counter() - started
        started = time.perf_counter()
        newest = checkpoints.newest()
        seconds["verified"] = time.perf_counter() - started
        assert newest is not None
        started = time.perf_counter()
        checkpoints.load(newest, engine)
        seconds["loaded"] = time.perf_counter() - started
        rows.append(seconds)
    numel = sum(param.numel() for param in engine.deepspeed.module.parameters())
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    shutil.rmtree(out / str(millions))
    return {"parameters": numel, "bytes": size, **medians}


def make_engine(millions: int, world: World) -> Engine:
    """A Llama in training that has taken one step, so that there are moments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = SHAPES[millions]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    policy = Policy(LlamaForCausalLM(config), logp_chunk=64)
    recipe = EngineRecipe(zero_stage=2)
    engine = Engine(policy, recipe, dtype="float32", temperature=1.0, total_updates=9, world=world)
    ids = torch.arange(16)[None]
    logp_BT, _ = engine.deepspeed(ids, ids, ids.roll(-1, 1), torch.ones_like(ids, dtype=torch.bool), temperature=1.0)
    engine.backward(-logp_BT.sum())
    engine.step()
    return engine


def table(found: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = ["| parameters | GB | training stops s | written s | verified s | loaded s |", "|---|---|---|---|---|---|"]
    for one in found:
        times = " | ".join(f"{one[name]:.2f}" for name in ("stopped", "written", "verified", "loaded"))
        lines.append(f"| {one['parameters'] / 1e6:.0f} M | {one['bytes'] / 1e9:.2f} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
