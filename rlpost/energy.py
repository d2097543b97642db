"""Energy that the hardware counts itself: NVIDIA GPUs through NVML, processors through RAPL where it may be read."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], float]
"""Joules since some moment in the past."""


class Meter:
    """Joules since the last reading, by what was measured; nothing where nothing counts them.

    >>> reading = iter([5.0, 7.5])
    >>> Meter({"gpu": lambda: next(reading)})()
    {'gpu': 2.5}
    """

    def __init__(self, counters: dict[str, Counter]) -> None:
        self.counters = counters
        self._before = {name: counter() for name, counter in counters.items()}

    def __call__(self) -> dict[str, float]:
        """Joules of each counter since the last call."""
        now = {name: counter() for name, counter in self.counters.items()}
        used = {name: joules - self._before[name] for name, joules in now.items()}
        self._before = now
        return used


def meter(device: Any, *, local_rank: int) -> Meter:
    """What counts energy here: this rank's GPU, and of the ranks of a machine the first has its processors."""
    counters: dict[str, Counter] = {}
    if device.type == "cuda" and (gpu := gpu_counter(device)) is not None:
        counters["gpu"] = gpu
    if not local_rank and (cpu := rapl_counter(POWERCAP)) is not None:
        counters["cpu"] = cpu
    return Meter(counters)


def gpu_counter(device: Any) -> Counter | None:
    """NVML's energy of a GPU since its driver was loaded; None where the library or the GPU does not tell."""
    if find_spec("pynvml") is None:
        return None
    import pynvml as nvml
    import torch

    try:
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)  # CUDA's own numbers skip GPUs that are hidden
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # it counts millijoules


def rapl_counter(powercap: Path) -> Counter | None:
    """RAPL's energy of all processor packages, wraps undone; None where there is none or root alone may read it."""
    packages = sorted(one for one in powercap.glob("intel-rapl:*") if one.name.count(":") == 1)
    try:
        read = [_Package(folder) for folder in packages]
    except (OSError, ValueError):
        return None
    return (lambda: sum(package() for package in read)) if read else None


class _Package:
    """One package's joules; its counter starts again at `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
        self._before, self._total = self._read(), 0

    def __call__(self) -> float:
        now = self._read()
        self._total += (now - self._before) % (self._range + 1)
        self._before = now
        return self._total / 1e6

    def _read(self) -> int:
        return int(self._file.read_text(encoding="ascii"))
