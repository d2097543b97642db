"""What a device can do at its best: a table for GPUs, a short measurement for a CPU."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
MATMUL_S, COPY_S = 0.3, 0.2
"""How long a CPU is measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """Memory of one rank and peak rates.

    >>> DEVICES["h100"].rate["bfloat16"] * 0.4  # FLOP/s, at a utilisation of 0.4
    395600000000000.0
    """

    name: str
    memory_gib: float
    rate: dict[str, float]
    """Dense matrix products by dtype, FLOP/s; float32 without TF32, as PyTorch has it unless told otherwise."""
    bandwidth: float
    """Bytes a second."""
    is_gpu: bool = True


# NVIDIA's data sheets (dense, the figures "with sparsity" halved): H100 SXM, H200 SXM, A100 80GB SXM, L40S, and the Ada
# architecture whitepaper for the RTX 4090 (bfloat16 with float32 accumulation). Memory is what is left of the nominal.
DEVICES = {
    "h100": Device("h100", 79.0, {"bfloat16": 989e12, "float32": 67e12}, 3.35e12),
    "h200": Device("h200", 139.0, {"bfloat16": 989e12, "float32": 67e12}, 4.8e12),
    "a100": Device("a100", 79.0, {"bfloat16": 312e12, "float32": 19.5e12}, 2.039e12),
    "l40s": Device("l40s", 44.5, {"bfloat16": 362e12, "float32": 91.6e12}, 0.864e12),
    "rtx4090": Device("rtx4090", 23.5, {"bfloat16": 165.2e12, "float32": 82.6e12}, 1.008e12),
}


def find_device(name: str | None, dtype: str, *, ranks: int) -> Device:
    """The named device, or what this machine has where the table knows it, else its CPU, which the ranks share."""
    chosen = name or _gpu_here() or "cpu"
    return DEVICES[chosen] if chosen in DEVICES else _measured_cpu(dtype, ranks)


def peak_here(dtype: str) -> float | None:
    """FLOP/s of this process's GPU at its best, where the table knows it."""
    found = _gpu_here()
    return None if found is None else DEVICES[found].rate[dtype]


def multiplies_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have instructions of their own here: on GPUs, and on some CPUs."""
    import torch

    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return torch.cuda.is_available()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _gpu_here() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    called = torch.cuda.get_device_name(0).lower().replace(" ", "")
    return next((name for name in DEVICES if name in called), None)


def _measured_cpu(dtype: str, ranks: int) -> Device:
    import torch

    size = 1024
    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    rate = _per_second(lambda: torch.mm(a, a), MATMUL_S) * 2 * size**3
    source = torch.ones(8 << 20)
    target = torch.empty_like(source)
    bandwidth = _per_second(lambda: target.copy_(source), COPY_S) * 2 * source.nbytes  # read and written
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", memory / GIB / ranks, {dtype: rate / ranks}, bandwidth / ranks, is_gpu=False)


def _per_second(call: Any, seconds: float) -> float:
    """How often `call` runs in a second; the first run, which warms up, is not counted."""
    call()
    started, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds or not count:
        call()
        count += 1
    return count / spent
