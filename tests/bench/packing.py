"""What rows without padding, shared prompts and balanced ranks gain.

    python -m tests.bench.packing                    # about two minutes

Tokens/s of forward and backward of a Llama of 3 M parameters in float32, each documents' token counted once, however
often it is computed. Balance is a simulation: costs by the formula of `rlpost.balance`, and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlpost.balance import cost, moves
from rlpost.document import Document
from rlpost.packing import DENSE_ROW_TOKENS, Packer
from rlpost.policy import Policy, seen
from rlpost.summary import machine, versions
from rlpost.types import Micro

CPU = torch.device("cpu")
VOCAB, HIDDEN = 512, 192
MICRO_TOKENS = 4096
PADDED_ROWS = 8
"""Documents of a padded rectangle, as they come."""
SHARED_PROMPT, SHARED_ANSWER, SHARED_ROLLOUTS, SHARED_ROW = 384, 64, 16, 2048
RANKS, RANK_DOCUMENTS, RANK_HIDDEN, RANK_LONGEST = (2, 8, 64), 64, 1536, 16384
SEEDS = 5
"""Draws of the simulation."""


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-packing/packing.json"))
    options = parser.parse_args()
    result = measure(repeats=options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for table in tables(result):
        Console().print(table)


def measure(*, repeats: int = 3) -> dict[str, Any]:
    """Tokens/s of every way to lay documents out, and simulated loads of ranks, ready for JSON."""
    policy = llama()
    lengths = {"equal": [64] * 24, "heavy-tailed": heavy_tailed(24, longest=512, seed=0)}
    speed = {name: speeds(policy, ways_of(documents(each)), repeats) for name, each in lengths.items()}
    prompt = tuple(random.Random(1).randrange(VOCAB) for _ in range(SHARED_PROMPT))
    group = [
        Document(prompt, one.token_ids[:SHARED_ANSWER], (0.0,) * SHARED_ANSWER)
        for one in documents([128] * SHARED_ROLLOUTS)
    ]
    return {
        "parameters": sum(param.numel() for param in policy.parameters()),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "speed": speed,
        "shared prompt": speeds(policy, sharing_of(group), repeats),
        "balance, simulated": {str(ranks): simulated(ranks) for ranks in RANKS},
        "versions": versions(),
        "machine": machine(),
    }


def ways_of(each: Sequence[Document]) -> dict[str, tuple[list[Micro], int]]:
    """Micro-batches, and the tokens of the documents in them."""
    tokens = sum(one.length for one in each)
    packer = Packer(MICRO_TOKENS, DENSE_ROW_TOKENS, CPU, hidden_size=HIDDEN, narrow_rows=True)
    rectangles = [each[i : i + PADDED_ROWS] for i in range(0, len(each), PADDED_ROWS)]
    return {
        "packed rows": (packer.micros(each), tokens),
        "padded rectangles": ([packer.micro([[one] for one in rows]) for rows in rectangles], tokens),
        "one document at a time": ([packer.micro([[one]]) for one in each], tokens),
    }


def sharing_of(each: Sequence[Document]) -> dict[str, tuple[list[Micro], int]]:
    """Answers to one long prompt, with a copy each and with one for those of a row."""
    tokens, found = sum(one.length for one in each), {}
    for name, row, share in (("own copies", SHARED_PROMPT + SHARED_ANSWER, False), ("shared", SHARED_ROW, True)):
        packer = Packer(MICRO_TOKENS, row, CPU, hidden_size=HIDDEN, share_prompts=share)
        found[f"{name}, rows of {row}"] = packer.micros(each), tokens
    return found


def speeds(policy: Policy, ways: dict[str, tuple[list[Micro], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Median tokens/s of each way, taken in turns after one that warms up, and the positions that it computes."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (micros, _) in ways.items():
            started = time.perf_counter()
            for micro in micros:
                train(policy, micro)
            if turn:
                spent[name].append(time.perf_counter() - started)
    return {
        name: {
            "tokens_per_s": tokens / statistics.median(spent[name]),
            "tokens": tokens,
            "positions": sum(micro.tokens_BT.numel() for micro in micros),
            "micros": len(micros),
        }
        for name, (micros, tokens) in ways.items()
    }


def train(policy: Policy, micro: Micro) -> None:
    """Forward and backward."""
    inputs = micro.tokens_BT, micro.position_BT, micro.target_BT, micro.mask_BT
    logp_BT, _ = policy(*inputs, temperature=1.0, seen_BTT=seen(micro))
    logp_BT.sum().backward()
    policy.zero_grad()


def simulated(ranks: int) -> dict[str, float]:
    """The busiest rank's cost over the mean, before and after documents move, and how many do: means over seeds."""
    before, after, moved = [], [], []
    for seed in range(SEEDS):
        lengths = heavy_tailed(ranks * RANK_DOCUMENTS, longest=RANK_LONGEST, seed=seed)
        costs = [[cost(length, RANK_HIDDEN) for length in lengths[rank::ranks]] for rank in range(ranks)]
        loads = [sum(own) for own in costs]
        before.append(max(loads) * ranks / sum(loads))
        found = moves(costs)
        for start, i, end in found:
            loads[start] -= costs[start][i]
            loads[end] += costs[start][i]
        after.append(max(loads) * ranks / sum(loads))
        moved.append(len(found) / len(lengths))
    means = (statistics.mean(x) for x in (before, after, moved))
    return dict(zip(("before", "after", "moved_frac"), means, strict=True))


def heavy_tailed(count: int, *, longest: int, seed: int) -> list[int]:
    """Log-normal lengths with a median of an eighth of the longest, sigma 1."""
    dice = random.Random(seed)
    return [min(longest, max(16, round(longest / 8 * dice.lognormvariate(0.0, 1.0)))) for _ in range(count)]


def documents(lengths: Sequence[int]) -> list[Document]:
    """Prompts of an eighth of each length, and answers."""
    dice, found = random.Random(2), []
    for length in lengths:
        ids = tuple(dice.randrange(VOCAB) for _ in range(length))
        found.append(Document(ids[: length // 8], ids[length // 8 :], (0.0,) * (length - length // 8)))
    return found


def llama() -> Policy:
    """A Llama of 3 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=4096, tie_word_embeddings=True)
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(config), logp_chunk=512)


def tables(result: dict[str, Any]) -> list[Table]:
    """The result, to read."""
    title = f"tokens/s, forward and backward, {result['parameters']:,} parameters, medians of {result['repeats']}"
    speed = Table("documents", "layout", "tokens/s", "against the last", "tokens", "positions", title=title)
    for name, ways in (*result["speed"].items(), ("long prompt", result["shared prompt"])):
        slowest = (list(ways.values())[0 if name == "long prompt" else -1])["tokens_per_s"]
        for way, one in ways.items():
            counts = f"{one['tokens']:,}", f"{one['positions']:,}"
            speed.add_row(name, way, f"{one['tokens_per_s']:,.0f}", f"{one['tokens_per_s'] / slowest:.2f}", *counts)
    balance = Table(
        "ranks", "busiest, before", "after", "moved", title="SIMULATED cost of the busiest rank over the mean"
    )
    for ranks, one in result["balance, simulated"].items():
        balance.add_row(ranks, f"{one['before']:.2f}", f"{one['after']:.2f}", f"{one['moved_frac']:.1%}")
    return [speed, balance]


if __name__ == "__main__":
    main()
