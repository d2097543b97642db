"""The largest memory in use since it was last asked for: of the device, or on a CPU of this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
PROCESS = Path("/proc/self")


class Gauge(Protocol):
    """Called at the end of a phase of the clock."""

    of: str
    """What is measured, in words."""

    def __call__(self) -> float:
        """The largest use since the last call, in GiB."""
        ...


class DevicePeak:
    """A GPU's memory as its driver sees it, everything on it included.

    torch counts what a sleeping vLLM has given back as if it were still held, so its own peak would be the same in each
    phase. What the driver counts now, and how far torch's cache was above its present size, make up the peak.
    """

    of = "device memory"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self()

    def __call__(self) -> float:
        """The largest use since the last call, in GiB."""
        from torch import cuda

        free, whole = cuda.mem_get_info(self.device)
        above = cuda.max_memory_reserved(self.device) - cuda.memory_reserved(self.device)
        cuda.reset_peak_memory_stats(self.device)
        return (whole - free + above) / GIB


class ResidentPeak:
    """This process's resident memory, its high-water mark taken back at each call. proc_pid_clear_refs(5)."""

    of = "resident memory of the process"

    def __init__(self) -> None:
        self._restart()

    def __call__(self) -> float:
        """The largest use since the last call, in GiB."""
        peak = resident_gib("VmHWM")
        self._restart()
        return peak

    def _restart(self) -> None:
        (PROCESS / "clear_refs").write_text("5")


class ResidentSample:
    """This process's resident memory as it is when asked, where its high-water mark may not be taken back."""

    of = "resident memory of the process, at the ends of phases only"

    def __call__(self) -> float:
        """The use now, in GiB."""
        return resident_gib("VmRSS")


def gauge_of(device: torch.device) -> Gauge:
    """The best gauge that this machine allows."""
    if device.type == "cuda":
        return DevicePeak(device)
    try:
        return ResidentPeak()
    except OSError:
        return ResidentSample()


def resident_gib(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in GiB."""
    lines = (PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kib) * 1024 / GIB


def fullest(ranks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each phase's peak on the rank where it is largest.

    >>> fullest([{"train": 3.0}, {"train": 2.0, "generate": 1.0}])
    {'train': 3.0, 'generate': 1.0}
    """
    merged: dict[str, float] = {}
    for peaks in ranks:
        for phase, gib in peaks.items():
            merged[phase] = max(gib, merged.get(phase, gib))
    return merged
