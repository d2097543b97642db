"""Folders of runs as `rlpost train` leaves them, made up: their figures follow from the seed."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import yaml

from rlpost.chosen import bins, quantiles
from rlpost.token_figures import packed

WORDS = [
    "let",
    "x",
    "be",
    "the",
    "sum",
    "of",
    "all",
    "terms",
    "so",
    "that",
    "the",
    "answer",
    "is",
    "3",
    "5",
    "7",
    "=",
    "+",
    "-",
]


def make_run(
    folder: Path,
    *,
    name: str = "made",
    steps: int = 12,
    seed: int = 0,
    samples: int = 2,
    finished: bool = True,
    lr: float = 1e-6,
) -> Path:
    """A run of so many steps, with an evaluation before and after and so many samples a step."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    before = evaluation(0, 0.4)
    rows = [before, *(step_row(i, i / steps, rng) for i in range(steps)), evaluation(steps - 1, 0.8)]
    write(folder / "metrics.jsonl", rows)
    write(folder / "samples.jsonl", [sample(i, rng) for i in range(steps) for _ in range(samples)])
    write(folder / "chosen.jsonl", [chosen(i, i / steps, rng) for i in range(steps)])
    recipe = {"name": name, "seed": seed, "steps": steps, "engine": {"lr": lr}, "rewards": [{"use": "exact_chain"}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary(name, steps) | {"recipe": recipe}))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def step_row(step: int, at: float, rng: random.Random) -> dict[str, Any]:
    """The figures of a step, `at` from 0 to 1 of the run."""
    passed = min(1.0, 0.4 + 0.4 * at + rng.gauss(0, 0.02))
    return {
        "step": step,
        "unix_s": 1.8e9 + 2.0 * step,
        "reward/mean": passed,
        "reward/solved_frac": passed,
        "reward/exact_chain": passed,
        "rollouts/pass@1": passed,
        "rollouts/pass@2": min(1.0, passed + 0.1),
        "rollouts/num": 64.0,
        "groups/num": 16.0,
        "groups/trained": 12.0,
        "groups/spread_frac": 0.75,
        "rollouts/discarded": 16.0,
        "tokens/generated": 1600.0,
        "tokens/discarded": 400.0,
        "policy/entropy": 0.5 - 0.2 * at,
        "optim/grad_norm": 0.3 + 0.05 * rng.random(),
        "mismatch/k3": 1e-7 * rng.random(),
        "time/generate_s": 1.0,
        "time/train_s": 0.5,
        "time/step_s": 1.5,
    }


def evaluation(step: int, passed: float) -> dict[str, Any]:
    """The figures of an evaluation."""
    rates = {"eval/pass@1": passed, "eval/pass@2": passed + 0.1, "eval/num_problems": 200, "eval/n": 4}
    return {"step": step, "unix_s": 1.8e9, **rates, "eval/pass@1/terms=3": passed}


def sample(step: int, rng: random.Random, completion: list[str] | None = None) -> dict[str, Any]:
    """A rollout with figures of its tokens."""
    tokens = completion or [f"{rng.choice(WORDS)} " for _ in range(rng.randint(5, 30))]
    right = float(rng.random() < 0.5)
    return {
        "step": step,
        "task": f"task-{rng.randint(0, 999)}",
        "prompt": f"What is {rng.randint(0, 99)} + 1?",
        "answer": "3",
        "completion": "".join(tokens),
        "reward": right,
        "parts": {"exact_chain": right},
        "finish_reason": "stop",
        "num_tokens": len(tokens),
        "tokens": {
            "pieces": base64.b64encode(bytes(map(len, tokens))).decode(),
            "logp": packed([-rng.expovariate(3) for _ in tokens]),
            "logp_diff": packed([rng.gauss(0, 0.01) for _ in tokens]),
            "advantage": 1.0 if right else -1.0,
        },
    }


def chosen(step: int, at: float, rng: random.Random) -> dict[str, Any]:
    """What a step chose."""
    rates = [min(1.0, max(0.0, rng.gauss(0.3 + 0.4 * at, 0.25))) for _ in range(16)]
    return {
        "step": step,
        "groups": 16,
        "tasks": 15,
        "success": quantiles(rates),
        "success_bins": bins(rates),
        "source": {"easy.jsonl": 10, "hard.jsonl": 6},
        "difficulty": quantiles([3 + rng.random() for _ in range(16)]),
    }


def summary(name: str, steps: int) -> dict[str, Any]:
    """What a finished run says of itself, as far as readers need it."""
    phases = {"setup": 9.0, "generate": 1.0 * steps, "train": 0.5 * steps}
    return {
        "name": name,
        "steps": steps,
        "wall_s": sum(phases.values()),
        "phase_s": phases,
        "overhead_frac": 0.0,
        "memory": {"of": "device memory", "peak_gib": {"generate": 7.5, "train": 3.0}},
        "machine": {"cpu": "a processor", "cores": 2, "gpus": [], "system": "Linux"},
        "versions": {"rlpost": "0.1.0"},
        "git_commit": "0123456789abcdef-dirty",
    }
