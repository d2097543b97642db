"""A model on data sets: `rlpost eval`. No trainer is built: vLLM reads the weights itself, one replica a rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.evaluate import Evaluator
from rlpost.evaluation.answers import append, line_of, open_folder
from rlpost.evaluation.result import figures_of, question, surroundings, weights_digests
from rlpost.evaluation.table import print_table
from rlpost.generate.base import Generator
from rlpost.manifest import on_main, write_json
from rlpost.model_source import model_folder
from rlpost.recipe import Recipe
from rlpost.render import Renderer
from rlpost.reward_recipe import bind_rewards
from rlpost.run import make_evaluator, make_renderer
from rlpost.sft import base_model
from rlpost.tasks import load_tasks
from rlpost.types import Task
from rlpost.world import World

ANSWERS_AT_ONCE = 1024
"""About so many answers a rank between two writes."""


@dataclass(frozen=True)
class OneSet:
    """A data set, and how the model is asked."""

    name: str
    recipe: Recipe
    evaluator: Evaluator


def evaluate_sets(asked: Sequence[tuple[str, Recipe]], world: World, *, out: Path | None) -> dict[str, Any]:
    """Figures and intervals of each data set; with `out` every answer is kept, and what is there is not asked again."""
    recipe = asked[0][1]
    folder = base_model(recipe, world) if recipe.sft else model_folder(recipe, world)
    sets = [OneSet(name, one, _evaluator(one, folder, world)) for name, one in asked]
    rows: dict[str, dict[int, dict[str, Any]]] = {one.name: {} for one in sets}
    if out is not None:
        weights = on_main(world, lambda: weights_digests(folder))
        questions = {one.name: question(one.recipe, one.evaluator, weights) for one in sets}
        for line in on_main(world, lambda: open_folder(out, questions)):
            rows[line["set"]][line["place"]] = line["row"]
    with ExitStack() as stack:
        for one in sets:
            stack.enter_context(closing(one.evaluator.rewards))
        generator: Generator | None = None
        for one in sets:
            left = [pair for pair in enumerate(one.evaluator.tasks) if pair[0] not in rows[one.name]]
            if not left:
                continue
            if generator is None:
                generator = stack.enter_context(
                    closing(folder_generator(recipe, folder, one.evaluator.renderer, world))
                )
            for part in _parts(left, one.recipe.evaluation.n, world.size):
                rows[one.name] |= _ask(one, part, generator, out)
                _tell(one, len(rows[one.name]), world)
    found = {one.name: figures_of([row for _, row in sorted(rows[one.name].items())], one.recipe) for one in sets}
    if world.is_main:
        print_table(found)
        if out is not None:
            sets_said = {name: one | {"asked": questions[name]} for name, one in found.items()}
            write_json(out / "result.json", surroundings(folder, world.size) | {"sets": sets_said})
    return found


def folder_generator(recipe: Recipe, folder: Path, renderer: Renderer, world: World) -> Generator:
    """A generator with the weights of a folder."""
    if recipe.generator.kind == "hf":
        from rlpost.generate.hf import FolderHf

        return FolderHf(recipe, folder, renderer, world)
    from rlpost.generate.local_vllm import FolderVllm

    return FolderVllm(recipe, folder, renderer, world)


def _evaluator(recipe: Recipe, folder: Path, world: World) -> Evaluator:
    assert recipe.tasks.eval is not None, "recipes_of has seen to it"
    tasks = load_tasks(recipe.tasks.eval, "tasks.eval")
    found = make_evaluator(recipe, tasks, make_renderer(recipe, folder), bind_rewards(recipe.rewards), world)
    assert found is not None, "load_tasks returns at least one"
    return found


def _ask(
    one: OneSet, part: Sequence[tuple[int, Task]], generator: Generator, out: Path | None
) -> dict[int, dict[str, Any]]:
    """How it went with some problems, by place; what was answered is written."""
    found = one.evaluator.answered(generator, part, keep=out is not None)
    if out is not None:
        lines = [
            line_of(one.name, place, task, row, answers)
            for (place, task), (row, answers) in zip(part, found, strict=True)
        ]
        on_main(one.evaluator.world, lambda: append(out, lines))
    return {place: row for (place, _), (row, _) in zip(part, found, strict=True)}


def _tell(one: OneSet, done: int, world: World) -> None:
    if world.is_main:
        print(f"eval: {one.name}: {done} of {len(one.evaluator.tasks)} problems", file=sys.stderr, flush=True)


def _parts(left: Sequence[tuple[int, Task]], n: int, ranks: int) -> Iterator[Sequence[tuple[int, Task]]]:
    size = max(1, ANSWERS_AT_ONCE // n) * ranks
    yield from (left[start : start + size] for start in range(0, len(left), size))
