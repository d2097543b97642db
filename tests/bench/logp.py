"""Log-probs and entropies in chunks against all logits at once: time, peak memory, and gradients.

    python -m tests.bench.logp                       # at the size of the target, and bfloat16 at smaller ones
    python -m tests.bench.logp --sweep               # over the size of a chunk

`plain` is logits, log_softmax, gather and entropy; `trl` the same as TRL 1.16 does it without its Triton kernel, which
spares copies; `chunked` is `rlpost.head`, and `float32 head` that with model.head_dtype=float32. They take turns, in
processes of their own, so that each one's peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlpost.head import Head, token_logp
from rlpost.peak import resident_gib
from rlpost.summary import machine, versions

TIME_TARGET, MEMORY_TARGET, GRADIENT_TARGET = 1.15, 0.15, 1e-5
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
ROW_TOKENS = 1024
"""Of a row in TRL's shape `[B, T, V]`."""


@dataclass(frozen=True)
class Case:
    """One size; the default is that of the target, with the hidden size of SmolLM2-135M."""

    tokens: int = 8192
    vocab: int = 49152
    hidden: int = 576
    dtype: str = "float32"
    chunk: int = Head().chunk
    ways: tuple[str, ...] = ("plain", "trl", "chunked")


# Where a CPU has no bfloat16 instructions its products are so slow that time and memory need a smaller size each.
IN_BFLOAT16 = ("plain", "trl", "chunked", "float32 head")
CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype="bfloat16", ways=IN_BFLOAT16),
    "bfloat16, few tokens": Case(tokens=512, dtype="bfloat16", ways=IN_BFLOAT16, chunk=128),
    "bfloat16, narrow": Case(hidden=32, dtype="bfloat16", ways=IN_BFLOAT16),
}


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="2,048 tokens in float32 in chunks of 128 to 2,048")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-logp/logp.json"))
    parser.add_argument("--child", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, case = options.child
        print(json.dumps(one(way, Case(**json.loads(case)))))
        return
    cases = {name: CASES[name] for name in options.case}
    if options.sweep:
        cases = {f"chunk {2**n}": Case(tokens=2048, chunk=2**n, ways=("chunked",)) for n in range(7, 12)}
    result = measure(cases, repeats=options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=110).print(table(result))


def measure(cases: dict[str, Case] = CASES, *, repeats: int = 5) -> dict[str, Any]:
    """Medians of each case and way, and how far each is from `plain`, ready for JSON."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        turns = [{way: in_a_process(way, case) for way in case.ways} for _ in range(repeats)]
        ways = {
            way: {key: statistics.median(turn[way][key] for turn in turns) for key in turns[0][way]} for way in turns[0]
        }
        if "plain" in ways:
            against_plain(ways)
            for way, errors in in_a_process("errors", case).items():
                ways[way]["errors"] = errors
        found[name] = {"case": asdict(case), "ways": ways}
    targets = {"time": TIME_TARGET, "memory": MEMORY_TARGET, "gradient": GRADIENT_TARGET}
    return {
        "threads": THREADS,
        "repeats": repeats,
        "cases": found,
        "targets": targets,
        "versions": versions(),
        "machine": machine(),
    }


def medians(turns: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure."""
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


def against_plain(ways: dict[str, dict[str, Any]]) -> None:
    """Add each way's share of the plain one's time and memory."""
    whole = {way: one["forward_s"] + one["backward_s"] for way, one in ways.items()}
    for way, one in ways.items():
        one["time_frac"] = whole[way] / whole["plain"]
        one["memory_frac"] = one["peak_mib"] / ways["plain"]["peak_mib"]


def in_a_process(way: str, case: Case) -> dict[str, Any]:
    """What `one` gives in a fresh process of `THREADS` threads."""
    command = [sys.executable, "-m", "tests.bench.logp", "--child", way, json.dumps(asdict(case))]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout)


def one(way: str, case: Case) -> dict[str, Any]:
    """One forward and backward: seconds, and how far the process grew above its inputs; or the errors of all ways."""
    if way == "errors":
        return errors(case)
    hidden_ND, weight_VD, target_N = inputs(case)
    torch.mm(hidden_ND[:64].detach(), weight_VD[:64].detach().T)  # the library's first call sets it up
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_gib("VmRSS")
    started = time.perf_counter()
    logp_N, _ = run(way, hidden_ND, weight_VD, target_N, case.chunk)
    middle = time.perf_counter()
    loss_of(logp_N).backward()
    ended = time.perf_counter()
    peak_mib = 1024 * (resident_gib("VmHWM") - before)
    return {"forward_s": middle - started, "backward_s": ended - middle, "peak_mib": peak_mib}


def errors(case: Case) -> dict[str, dict[str, float]]:
    """Relative distance |x - y| / |y| of each way's results from plain float32 on the same numbers."""
    exact = results("plain", replace(case, dtype="float32"), like=case)
    return {
        way: {name: distance(x, exact[name]) for name, x in results(way, case, like=case).items()} for way in case.ways
    }


def results(way: str, case: Case, *, like: Case) -> dict[str, Tensor]:
    """Log-probs, entropies and gradients; the inputs are those of `like`, in the dtype of `case`."""
    hidden_ND, weight_VD, target_N = inputs(like)
    dtype = getattr(torch, case.dtype)
    hidden_ND, weight_VD = (x.detach().to(dtype).requires_grad_() for x in (hidden_ND, weight_VD))
    logp_N, entropy_N = run(way, hidden_ND, weight_VD, target_N, case.chunk)
    loss_of(logp_N).backward()
    found = {"logp": logp_N, "entropy": entropy_N, "grad_hidden": hidden_ND.grad, "grad_weight": weight_VD.grad}
    return {name: x.detach() for name, x in found.items() if x is not None}


def distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def loss_of(logp_N: Tensor) -> Tensor:
    """A loss whose gradient differs between tokens, as advantages make it."""
    return (logp_N * torch.linspace(-1, 1, len(logp_N))).sum()


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden_ND = torch.randn(case.tokens, case.hidden).to(dtype).requires_grad_()
    weight_VD = (0.05 * torch.randn(case.vocab, case.hidden)).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(case.vocab, (case.tokens,))


def run(way: str, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, one way or another."""
    if way == "plain":
        return plain(hidden_ND, weight_VD, target_N)
    if way == "trl":
        return as_trl(hidden_ND, weight_VD, target_N)
    return token_logp(hidden_ND, weight_VD, None, target_N, Head(chunk=chunk, exact=way == "float32 head"))


def plain(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """All logits in float32, log_softmax, gather, and the entropy for the log."""
    logp_NV = torch.log_softmax(torch.nn.functional.linear(hidden_ND, weight_VD).float(), dim=-1)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(-1, target_N[:, None]).squeeze(-1), entropy_N


def as_trl(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` and `entropy_from_logits` of TRL 1.16, trl/trainer/utils.py; logits stay as they come."""
    rows = -(-len(target_N) // ROW_TOKENS)
    logits_BTV = torch.nn.functional.linear(hidden_ND, weight_VD).unflatten(0, (rows, -1))
    target_BT = target_N.unflatten(0, (rows, -1))
    if logits_BTV.dtype == torch.float32:
        at_target_BT = logits_BTV.gather(-1, target_BT[..., None]).squeeze(-1)
        logp_BT = at_target_BT - torch.stack([torch.logsumexp(logits_TV, -1) for logits_TV in logits_BTV])
    else:
        pairs = zip(logits_BTV, target_BT, strict=True)
        logp_BT = torch.stack([torch.log_softmax(x_TV, -1).gather(-1, y_T[:, None])[:, 0] for x_TV, y_T in pairs])
    with torch.no_grad():
        pieces: list[Tensor] = []
        for piece_nV in logits_BTV.flatten(0, 1).split(128):
            logp_nV = torch.log_softmax(piece_nV, -1)
            pieces.append(-(logp_nV.exp() * logp_nV).sum(-1))
    return logp_BT.flatten(), torch.cat(pieces)


def table(result: dict[str, Any]) -> Table:
    """The result, to read."""
    shown = Table(title=f"medians of {result['repeats']}, {result['threads']} threads; shares are of plain")
    for column in ("case", "way", "forward s", "backward s", "time", "peak MiB", "memory", "grad error, x / w"):
        shown.add_column(column, justify="left" if column in ("case", "way") else "right")
    for name, found in result["cases"].items():
        for way, one in found["ways"].items():
            cells = [f"{one['forward_s']:.2f}", f"{one['backward_s']:.2f}", "", f"{one['peak_mib']:.0f}", "", ""]
            if "errors" in one:
                of = one["errors"]
                cells[2], cells[4] = f"{one['time_frac']:.2f}", f"{one['memory_frac']:.1%}"
                cells[5] = f"{of['grad_hidden']:.1e} / {of['grad_weight']:.1e}"
            shown.add_row(name, way, *cells)
    return shown


if __name__ == "__main__":
    main()
