"""How long generator servers stand still for a weight update, beside a plain copy of the same bytes.

python -m tests.bench.server_sync --repeats 7 [--hidden 768 --layers 8] [--out FILE.json]

One rank, one server, weights in shared memory. `update` is what the server sees: shut, loaded, proved by the canary,
open. `load` is the part of it that grows with the weights; `write` goes before it, while the server still writes
answers. `copy` goes from one part of memory to another that is there, `clone` to one that is made for it. All take
turns; medians of the repeats, after one that is not counted. On a CPU vLLM packs each weight anew for its products.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rlpost.__main__ import quiet
from rlpost.engine import Engine
from rlpost.generate.base import Canary, canary_tokens
from rlpost.generate.remote_vllm import RemoteVllm
from rlpost.policy import load_policy
from rlpost.recipe import EngineRecipe, GeneratorRecipe, InitModel, Model, Prompting, Recipe
from rlpost.render import Renderer, build_tokenizer
from rlpost.server_recipe import Servers
from rlpost.servers.start import start_servers
from rlpost.summary import machine, versions
from rlpost.world import World

TARGET = 3.0


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(InitModel(tokenizer="char", alphabet="0123456789+-=;#"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(world: World, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_model(folder / "model", options.hidden, options.layers)
    generator = GeneratorRecipe(kind="remote_vllm", kv_cache_gib=0.25, max_num_seqs=8, servers=Servers())
    recipe = Recipe(model=Model(path=str(folder / "model"), dtype="float32", context=128), generator=generator)
    started = start_servers(recipe, folder / "model", folder, world)
    assert started is not None
    policy = load_policy(folder / "model", recipe.model)
    engine = Engine(policy, EngineRecipe(lr=1e-5), dtype="float32", temperature=1.0, total_updates=9, world=world)
    tokenizer = build_tokenizer(InitModel(tokenizer="char", alphabet="0123456789+-=;#"))
    canary = Canary.of(canary_tokens((3, 4, 5), len(tokenizer)), tolerance=1e-3, device=world.device)
    remote = RemoteVllm(recipe, Renderer(tokenizer, Prompting(), 128), canary, world, started)
    size = sum(one.numel() * one.element_size() for one in policy.parameters())
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    found: dict[str, list[float]] = {"copy": [], "clone": [], "update": [], "load": [], "write": []}
    try:
        for version in range(options.repeats + 1):
            found["copy"].append(timed(lambda: target.copy_(source)))
            found["clone"].append(timed(source.clone))
            load, gather = [0.0], [0.0]
            with remote.awake(engine, version) if version == 0 else watched(remote, engine, version, load, gather):
                found["update"].append(remote.report.figures["servers/update_s"])
            found["load"].append(load[0])
            found["write"].append(gather[0])
    finally:
        remote.close()
    return {"bytes": size, **{name: statistics.median(seconds[1:]) for name, seconds in found.items()}}


def watched(remote: RemoteVllm, engine: Engine, version: int, load: list[float], gather: list[float]) -> Any:
    """`awake`, with what two of its parts took."""
    transfer = remote._transfer
    own_load, own_gather = type(transfer).load, type(transfer).gather

    def timed_load(replica: Any, version: int) -> None:
        load[0] = timed(lambda: own_load(transfer, replica, version))

    def timed_gather() -> None:
        gather[0] = timed(lambda: own_gather(transfer))

    transfer.load, transfer.gather = timed_load, timed_gather
    return remote.awake(engine, version)


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    """Measure, print a table, write JSON where asked."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("RLPOST_SERVER_KEY", secrets.token_urlsafe(24))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world = World().start()
    with tempfile.TemporaryDirectory() as name:
        found = measure(world, Path(name), options)
    world.stop()
    print(f"| {found['bytes'] / 1e6:.0f} MB | ms | times the copy |\n|---|---|---|")
    for part in ("copy", "clone", "update", "load", "write"):
        print(f"| {part} | {1000 * found[part]:.0f} | {found[part] / found['copy']:.2f} |")
    times = " and ".join(f"{found['update'] / found[part]:.2f} times a {part}" for part in ("copy", "clone"))
    print(f"the server stands still for {times}; the target is below {TARGET:g}")
    if options.out:
        options.out.write_text(json.dumps(found | {"machine": machine(), "versions": versions()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
