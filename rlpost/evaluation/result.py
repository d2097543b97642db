"""What an evaluation says: figures with intervals, and everything that is needed to repeat it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpost.evaluate import Evaluator, mean_of, per_problem, tabulate
from rlpost.evaluation.intervals import intervals
from rlpost.recipe import Recipe
from rlpost.sources import kind_of
from rlpost.summary import git_commit, machine, versions
from rlpost.types import Task

DECIDES = ("model", "rewards", "rollout", "sampling", "seed")
"""Sections of a recipe that change answers or verdicts, whole; of `tasks`, `evaluation` and `generator` parts do."""


def question(recipe: Recipe, evaluator: Evaluator, weights: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what a model answers and what is called right, as JSON: equal questions, equal answers.

    Up to rounding, and on as many ranks unless generator.seeding is `request`.
    """
    asked = asdict(recipe)
    assert recipe.tasks.eval is not None
    return json.loads(
        json.dumps(
            {key: asked[key] for key in DECIDES}
            | {
                "tasks": {"eval": asked["tasks"]["eval"], "prompting": asked["tasks"]["prompting"]},
                "evaluation": {key: value for key, value in asked["evaluation"].items() if key not in ("every", "k")},
                "generator": {key: asked["generator"][key] for key in ("kind", "seeding", "options")},
                "interruption": asked["algorithm"]["interruption"],
                "context": evaluator.renderer.context,
                "stop_ids": list(evaluator.renderer.stop_ids),
                "template_sha256": _digest(str(evaluator.renderer.tokenizer.chat_template)),
                "tasks_sha256": tasks_digest(evaluator.tasks),
                "file_sha256": _file_digest(recipe.tasks.eval.path),
                "weights_sha256": dict(weights),
            }
        )
    )


def figures_of(rows: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Figures, and 95 % intervals of those that are means over problems."""
    n, ks = recipe.evaluation.n, recipe.evaluation.k
    found = intervals(per_problem(rows, n, ks), seed=recipe.seed)
    figures = tabulate(rows, n, ks)
    if "pass@1" in figures and not any(row["unjudged"] for row in rows):
        figures[f"mean@{n}"] = figures["pass@1"]  # the same by another name, where every answer was judged
    return {"figures": figures, "intervals": {name: list(ends) for name, ends in found.items()}}


def compared(
    mine: Mapping[str, dict[str, Any]], theirs: Mapping[str, dict[str, Any]], recipe: Recipe
) -> dict[str, list[float]]:
    """Of each figure [difference, low, high], this evaluation less another, problem by problem; rows by key.

    What both found hard cancels out, which makes it surer than two intervals side by side: arXiv:2411.00640, section 4.
    """
    n, ks = recipe.evaluation.n, recipe.evaluation.k
    keys = [key for key in mine if key in theirs]
    ours, others = (per_problem([rows[key] for key in keys], n, ks) for rows in (mine, theirs))
    less = {
        name: [None if a is None or b is None else a - b for a, b in zip(ours[name], others[name], strict=True)]
        for name in ours
        if name in others
    }
    found = intervals(less, seed=recipe.seed, differences=True)
    return {name: [mean, *found[name]] for name in found if (mean := mean_of(less[name])) is not None}


def surroundings(folder: Path, ranks: int) -> dict[str, Any]:
    """What ran, on what, and how it was started."""
    return {
        "model": str(folder),
        "command": sys.argv[1:],
        "ranks": ranks,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
    }


def tasks_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 of keys, prompts and answers in their order: of what was asked, wherever it came from."""
    return _digest(json.dumps([[task.key, task.prompt, task.answer] for task in tasks]))


def weights_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a model folder's configuration, tokenizer and weights."""
    endings = (".safetensors", ".json", ".jinja", ".model", ".bin")
    files = sorted(file for file in folder.iterdir() if file.name.endswith(endings) and file.is_file())
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _file_digest(path: str) -> str | None:
    if kind_of(path) != "file":
        return None
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
