"""Forward and backward of packed rows against the matrix products in them, each timed alone on the same shapes.

    python -m tests.bench.products

A layer `y = x W` has three products: y, the gradient of x, that of W. What is left of the time is attention, norms,
activations, copies, and the fourth product of the head, which is made anew instead of kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.devices import multiplies_bfloat16
from rlpost.document import Document
from rlpost.packing import Packer
from rlpost.policy import Policy

SHAPES = {
    "3.4 M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    "135 M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
}
MORE = {
    "3.4 M": {"vocab_size": 56, "num_key_value_heads": 4},
    "135 M": {"vocab_size": 49152, "num_key_value_heads": 3},
}
ROW, ROWS, PROMPT = 256, 8, 32


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-products.json"))
    options = parser.parse_args()
    result = measure(options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def measure(repeats: int) -> dict[str, Any]:
    """Both models in float32, and in bfloat16 where the processor multiplies it."""
    dtypes = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]
    return {
        f"{name}, {str(dtype).removeprefix('torch.')}": measure_one(name, dtype, repeats)
        for name in SHAPES
        for dtype in dtypes
    }


def measure_one(name: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward, and of the products alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], **MORE[name], tie_word_embeddings=True, attn_implementation="sdpa")
    policy = Policy(LlamaForCausalLM(config).to(dtype), logp_chunk=256)
    document = Document((1,) * PROMPT, (2,) * (ROW - PROMPT), (0.0,) * (ROW - PROMPT))
    micro = Packer(ROW * ROWS, ROW, torch.device("cpu")).micro([[document]] * ROWS)
    shapes = products_of(policy, lambda: forward(policy, micro))

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        forward(policy, micro).sum().backward()

    step_s, alone_s = [], []
    for _ in range(repeats):
        step_s.append(seconds_of(step))
        alone_s.append(sum(count * products_s(shape, dtype) for shape, count in shapes.items()))
    flops = sum(6 * count * m * k * n for (m, k, n), count in shapes.items())
    step, alone = statistics.median(step_s), statistics.median(alone_s)
    return {"step_s": step, "products_s": alone, "gflops": flops / alone / 1e9, "frac": alone / step}


def forward(policy: Policy, micro: Any) -> Tensor:
    """Log-probs of a micro-batch."""
    logp_BT, _ = policy(micro.tokens_BT, micro.position_BT, micro.target_BT, micro.mask_BT, temperature=1.0)
    return logp_BT


def products_of(policy: Policy, run: Callable[[], Any]) -> Counter[tuple[int, int, int]]:
    """(rows, in, out) of every linear layer in a forward pass, and of the head over the trained tokens."""
    found: Counter[tuple[int, int, int]] = Counter()

    def note(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found[inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

    layers = [layer for layer in policy.model.base_model.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    vocab, hidden = policy.head.weight.shape
    found[ROWS * (ROW - PROMPT), hidden, vocab] += 1
    return found


def products_s(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Seconds of the three products of a layer."""
    m, k, n = shape
    x, w, grad = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.randn(m, n).to(dtype)
    ways: list[Callable[[], Tensor]] = [lambda: x @ w, lambda: grad @ w.T, lambda: x.T @ grad]
    return sum(min(seconds_of(way), seconds_of(way)) for way in ways)


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| model | forward and backward s | products alone s | their rate | share |", "|---|---|---|---|---|"]
    for name, one in result.items():
        seconds = f"{one['step_s']:.2f} | {one['products_s']:.2f}"
        lines.append(f"| {name} | {seconds} | {one['gflops']:.0f} GFLOP/s | {one['frac']:.0%} |")
    return "\n".join([*lines, "", f"{ROWS} rows of {ROW} positions; target: 60 %."])


if __name__ == "__main__":
    main()
