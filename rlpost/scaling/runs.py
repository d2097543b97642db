"""What runs have logged, as curves: held-out success over compute, rollouts, prompts and seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlpost.errors import RunError
from rlpost.scaling.laws import Array

Compute = Literal["total", "six_nt"]
"""All FLOPs but those of evaluation, or 6 N T of what is trained, as arXiv:2509.25300 counts them."""
APART = (
    "name",
    "run_dir",
    "resume",
    "logging",
    "save_every",
    "keep_checkpoints",
    "model",
    "sft",
    "steps",
    "evaluation",
)
"""Of a recipe: what two runs may differ in and still be alike; the model counts by its size."""


@dataclass(frozen=True)
class RunCurve:
    """One run. Shapes: `e` evaluations, `s` steps."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    size: float
    """Parameters without embeddings; nan where nothing says how many."""
    step_e: Array
    """Steps before each evaluation."""
    pass_e: Array
    """Held-out pass@1."""
    trials: float
    """Answers behind one evaluation."""
    compute_e: Array
    """FLOPs so far, counted as was asked; nan where nothing says how many."""
    rollouts_e: Array
    prompts_e: Array
    seconds_e: Array
    """Of steps so far, on one device; evaluation is not counted."""
    passes: float
    """Times that the run went through its training tasks; nan where that is not known."""
    steps: tuple[dict[str, Any], ...]
    """The logged figures of each step."""

    @property
    def loss_e(self) -> Array:
        """1 - pass@1."""
        return 1 - self.pass_e

    @property
    def planned(self) -> int:
        """Steps that the recipe asks for."""
        return int(self.recipe.get("steps", 0))

    def per_step(self, name: str) -> float:
        """Compute, rollouts, prompts or seconds of a step, on average."""
        return float(getattr(self, f"{name}_e")[-1] / self.step_e[-1]) if self.step_e[-1] else float("nan")


def read_runs(folders: Iterable[str | Path], compute: Compute = "total") -> list[RunCurve]:
    """The curves of all runs; a folder of several runs stands for them."""
    found = [run for folder in folders for run in _run_folders(Path(folder))]
    if not found:
        raise RunError("scaling needs at least one run: name folders such as runs/quickstart")
    return [read_run(folder, compute) for folder in dict.fromkeys(found)]


def _run_folders(folder: Path) -> list[Path]:
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl")) if folder.is_dir() else []
    if not inside:
        raise RunError(f"{folder} must be the folder of a run, or hold such folders (it has no metrics.jsonl)")
    return inside


def read_run(folder: Path, compute: Compute = "total") -> RunCurve:
    """The curve of one run, finished or not."""
    lines, recipe = _lines(folder / "metrics.jsonl"), _recipe(folder)
    size = model_size(recipe)
    steps = tuple(line for line in lines if "rollouts/num" in line)
    evals = [(i, line) for i, line in enumerate(lines) if line.get("eval/pass@1") is not None]
    if not evals:
        raise RunError(f"{folder} must hold held-out evaluations (it has none): give the recipe tasks.eval")
    before = [[line for line in lines[:i] if "rollouts/num" in line] for i, _ in evals]

    def so_far(value: Any) -> Array:
        return np.array([sum(value(line) for line in past) for past in before], dtype=float)

    first = evals[0][1]
    epoch = next((line["curriculum/epoch"] for line in reversed(steps) if "curriculum/epoch" in line), float("nan"))
    return RunCurve(
        name=folder.name,
        folder=folder,
        recipe=recipe,
        size=size,
        step_e=so_far(lambda line: 1),
        pass_e=np.array([line["eval/pass@1"] for _, line in evals], dtype=float),
        trials=float(first.get("eval/num_problems", 0) * first.get("eval/n", 1)),
        compute_e=so_far(lambda line: flops_of(line, size, compute)),
        rollouts_e=so_far(lambda line: line["rollouts/num"] + line.get("guided/num", 0)),
        prompts_e=so_far(lambda line: line.get("groups/num", float("nan"))),
        seconds_e=so_far(lambda line: line.get("time/step_s", float("nan")) - line.get("time/evaluate_s", 0.0)),
        passes=float(epoch),
        steps=steps,
    )


def flops_of(line: dict[str, Any], size: float, compute: Compute) -> float:
    """FLOPs of one step; where they were not logged, 6 N T over the tokens that were trained."""
    if compute == "total" and "flops/total" in line:
        return float(line["flops/total"] - line.get("flops/evaluate", 0.0))
    if "flops/six_nt" in line:
        return float(line["flops/six_nt"])
    return 6 * size * float(line.get("tokens/processed", line.get("tokens/trained", float("nan"))))


def model_size(recipe: dict[str, Any]) -> float:
    """Parameters of the layers, without embeddings, norms and head; from `model.init`, or the folder's config.json.

    >>> model_size({"model": {"init": {"hidden_size": 8, "intermediate_size": 16, "num_layers": 2, "num_heads": 2}}})
    1280.0
    """
    model = recipe.get("model", {})
    shape, path = model.get("init"), model.get("path")
    if shape is None and path and (Path(path) / "config.json").is_file():
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        names |= {"num_kv_heads": "num_key_value_heads"}
        keys = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        shape = {key: config.get(names.get(key, key)) for key in keys}
    if not shape or not all(shape.get(key) for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")):
        return float("nan")
    from rlpost.flops import Shape

    heads, hidden = shape["num_heads"], shape["hidden_size"]
    found = Shape(
        layers=shape["num_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=shape.get("num_kv_heads") or heads,
        head_dim=shape.get("head_dim") or hidden // heads,
        mlp=shape["intermediate_size"],
        vocab=1,
    )
    return float(found.attention_weights + found.mlp_weights)


def alike(run: RunCurve, but: Sequence[str] = ()) -> str:
    """A text that is the same for runs that differ by seeds and names alone, and by the fields `but`."""
    tree = {key: deepcopy(value) for key, value in run.recipe.items() if key not in APART}
    for field in but:
        *path, last = field.split(".")
        inner = tree
        for key in path:
            inner = inner.get(key, {})
        inner.pop(last, None)
    size = "" if "model" in but else f"{run.size:g}"
    return json.dumps([_without_seeds(tree), size], sort_keys=True)


def _without_seeds(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_seeds(value) for key, value in tree.items() if key != "seed"}
    return [_without_seeds(value) for value in tree] if isinstance(tree, list) else tree


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; the last may be half written, as the run may still go."""
    rows = path.read_text(encoding="utf-8").splitlines()
    found = []
    for i, row in enumerate(rows):
        try:
            found.append(json.loads(row))
        except json.JSONDecodeError as error:
            if i + 1 == len(rows):
                break
            raise RunError(f"{path}:{i + 1} must be JSON (it is not: {error.msg}): restore the file") from error
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe, from summary.json of a finished run, else from recipe.yaml."""
    summary, recipe = folder / "summary.json", folder / "recipe.yaml"
    if summary.is_file():
        return dict(json.loads(summary.read_text(encoding="utf-8"))["recipe"])
    if not recipe.is_file():
        raise RunError(f"{folder} must hold recipe.yaml or summary.json (it has neither): name a run's whole folder")
    import yaml

    return dict(yaml.safe_load(recipe.read_text(encoding="utf-8")))
