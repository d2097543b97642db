"""Folders of runs that were never run: metrics.jsonl and recipe.yaml with curves that follow a law."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

FLOPS_A_STEP = 1e9
ROLLOUTS_A_STEP, PROMPTS_A_STEP = 512, 32
SHAPES = {64: 2, 96: 3, 160: 5, 256: 8}
"""Hidden size and heads of small models of three layers."""


def write_run(
    folder: Path,
    passed: Callable[[float], float],
    *,
    hidden: int = 64,
    steps: int = 40,
    every: int = 4,
    seed: int = 0,
    noise: float = 0.0,
    flops: float = FLOPS_A_STEP,
    recipe: dict[str, Any] | None = None,
    figures: Callable[[int], dict[str, float]] = lambda step: {},
    finished: bool = False,
) -> Path:
    """A run whose held-out pass@1 is `passed(steps so far)` and noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []

    def evaluate(step: int) -> None:
        value = float(np.clip(passed(step) + noise * rng.standard_normal(), 0, 1))
        lines.append({"step": max(step - 1, 0), "eval/pass@1": value, "eval/num_problems": 200, "eval/n": 8})

    evaluate(0)
    for step in range(steps):
        cost = {"flops/total": flops, "flops/six_nt": flops / 2, "time/step_s": 2.0}
        count = {"rollouts/num": ROLLOUTS_A_STEP, "groups/num": PROMPTS_A_STEP}
        lines.append({"step": step, **count, **cost, **figures(step)})
        if (step + 1) % every == 0:
            evaluate(step + 1)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_layers": 3, "num_heads": SHAPES[hidden]}
    tree = {
        "name": folder.name,
        "seed": seed,
        "steps": steps,
        "prompts_per_step": PROMPTS_A_STEP,
        "sampling": {"group_size": 16},
        "model": {"init": shape},
        "engine": {"lr": 1e-3},
        "tasks": {"train": {"config": {"size": 640, "seed": seed}}},
    }
    for key, value in (recipe or {}).items():
        *path, last = key.split(".")
        inner: Any = tree
        for part in path:
            inner = inner[part]
        inner[last] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"recipe": tree}))
    return folder


def rising(start: float = 0.3, top: float = 0.8, middle: float = 12.0, steep: float = 1.5) -> Callable[[float], float]:
    """A sigmoid over steps."""
    return lambda step: start + (top - start) / (1 + (middle / step) ** steep) if step else start


def power(k: float, loss: float = 0.7) -> Callable[[float], float]:
    """A line in log-log over steps, with this loss after one step; before it, as after it."""
    return lambda step: 1 - loss * max(step, 1.0) ** -k
