"""A model on data sets: `rlpost eval`. No trainer is built: vLLM reads the weights itself, one replica a rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.evaluate import Evaluator
from rlpost.evaluation.answers import ASKED, append, line_of, open_folder, read_answers
from rlpost.evaluation.result import compared, figures_of, question, surroundings, weights_digests
from rlpost.evaluation.table import print_differences, print_table
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


def evaluate_sets(
    asked: Sequence[tuple[str, Recipe]], world: World, *, out: Path | None, against: Path | None = None
) -> dict[str, Any]:
    """Figures and intervals of each data set; with `out` every answer is kept, and what is there is not asked again."""
    recipe = asked[0][1]
    folder = base_model(recipe, world) if recipe.sft else model_folder(recipe, world)
    sets = [OneSet(name, one, _evaluator(one, folder, world)) for name, one in asked]
    others = on_main(world, lambda: _others(against, sets)) if against is not None else {}
    rows: dict[str, dict[int, dict[str, Any]]] = {one.name: {} for one in sets}
    questions: dict[str, Any] = {}
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
            if left and generator is None:
                made = folder_generator(recipe, folder, one.evaluator.renderer, world)
                generator = stack.enter_context(closing(made))
            for part in _parts(left, one.recipe.evaluation.n, world.size):
                assert generator is not None, "something is left"
                rows[one.name] |= _ask(one, part, generator, out)
                _tell(one, len(rows[one.name]), world)
    found = {one.name: _found(one, rows[one.name], others.get(one.name)) for one in sets}
    if world.is_main:
        _show(found, against)
        if out is not None:
            sets_said = {name: one | {"asked": questions[name]} for name, one in found.items()}
            write_json(out / "result.json", surroundings(folder, world.size) | {"sets": sets_said})
    return found


def _others(folder: Path, sets: Sequence[OneSet]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows of another evaluation by set and key."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in read_answers(folder):
        found.setdefault(line["set"], {})[line["key"]] = line["row"]
    lacks = [one.name for one in sets if one.name not in found]
    if lacks or not found:
        raise RunError(f"--against: {folder} must have answers to every set (none to {', '.join(lacks)}): name another")
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    for one in sets:
        theirs, ours = asked[one.name]["evaluation"]["n"], one.recipe.evaluation.n
        if theirs != ours:
            raise RunError(
                f"--against: {folder} must have as many answers a problem (got {theirs} for {one.name}, and {ours} "
                "here): give the same -n"
            )
    return found


def _found(
    one: OneSet, rows: Mapping[int, dict[str, Any]], others: Mapping[str, dict[str, Any]] | None
) -> dict[str, Any]:
    said = figures_of([row for _, row in sorted(rows.items())], one.recipe)
    if others is None:
        return said
    mine = {task.key: rows[place] for place, task in enumerate(one.evaluator.tasks)}
    shared = sum(key in others for key in mine)
    return said | {"against": {"problems": shared, "difference": compared(mine, others, one.recipe)}}


def _show(found: Mapping[str, Any], against: Path | None) -> None:
    print_table(found)
    if against is not None:
        print_differences(found, against.name)


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
    found = make_evaluator(
        recipe, tasks, make_renderer(recipe, folder), bind_rewards(recipe.rewards, recipe.failure), world
    )
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
