"""Log-probs and entropies in chunks against all logits at once: time and peak memory, forward and backward.

python -m tests.bench.logp --tokens 8192 --vocab 49152 --hidden 576 --dtype bfloat16

The two take turns in processes of their own, so that each one's peak memory is its own; medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.head import Head, token_logp

WAYS = ("plain", "chunked")


def main() -> None:
    """Measure both ways in turn, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, "-m", "tests.bench.logp", *sys.argv[1:], "--way", way]
            runs[way].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    result = {way: {key: statistics.median(run[key] for run in runs[way]) for key in runs[way][0]} for way in WAYS}
    result |= {"options": {key: str(value) for key, value in vars(options).items()}, "torch": torch.__version__}
    print("| | forward s | backward s | both s | peak MiB above the inputs |\n|---|---|---|---|---|")
    for way in WAYS:
        one = result[way]
        both = one["forward_s"] + one["backward_s"]
        print(f"| {way} | {one['forward_s']:.2f} | {one['backward_s']:.2f} | {both:.2f} | {one['peak_mib']:.0f} |")
    ours, theirs = (result[way]["forward_s"] + result[way]["backward_s"] for way in reversed(WAYS))
    memory = result["chunked"]["peak_mib"] / result["plain"]["peak_mib"]
    print(f"\ntime {ours / theirs:.2f} of plain, memory {memory:.1%} of plain")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward of one way: seconds, and how far the process grew."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden_ND = torch.randn(options.tokens, options.hidden).to(dtype).requires_grad_()
    weight_VD = (0.05 * torch.randn(options.vocab, options.hidden)).to(dtype).requires_grad_()
    target_N = torch.randint(options.vocab, (options.tokens,))
    torch.mm(hidden_ND[:64].detach(), weight_VD[:64].detach().T)  # the library's first call sets it up
    before = peak_mib()
    started = time.perf_counter()
    if options.way == "plain":
        logp_N, _ = plain(hidden_ND, weight_VD, target_N)
    else:
        logp_N, _ = token_logp(hidden_ND, weight_VD, None, target_N, Head(chunk=options.chunk))
    middle = time.perf_counter()
    logp_N.mean().backward()
    ended = time.perf_counter()
    return {"forward_s": middle - started, "backward_s": ended - middle, "peak_mib": peak_mib() - before}


def plain(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer without chunks does: all logits in float32, log_softmax, and the entropy for the log."""
    logp_NV = torch.log_softmax(torch.nn.functional.linear(hidden_ND, weight_VD).float(), dim=-1)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(-1, target_N[:, None]).squeeze(-1), entropy_N


def peak_mib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
