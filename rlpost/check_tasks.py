"""What the `tasks` and `evaluation` sections must be."""

from __future__ import annotations

import math

from rlpost.errors import RecipeError
from rlpost.plugins import did_you_mean
from rlpost.recipe import Recipe
from rlpost.sources import kind_of, source_problems
from rlpost.task_filters import label
from rlpost.task_recipe import Tasks, TaskSource
from rlpost.votes import voter


def task_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the sources of tasks, as far as it shows without reading them."""
    tasks = recipe.tasks
    against = {f"tasks.decontaminate.against.{i}": one for i, one in enumerate(tasks.decontaminate.against)}
    held_out = {} if tasks.eval is None else {"tasks.eval": tasks.eval}
    problems = []
    for where, source in (tasks.sources | held_out | against).items():
        problems += source_problems(source, where) + _filter_problems(source, where)
    return problems + _mixture_problems(tasks) + _decontaminate_problems(tasks)


def _filter_problems(source: TaskSource, where: str) -> list[str]:
    keep = source.keep
    ends = {"difficulty": (keep.min_difficulty, keep.max_difficulty), "tokens": (keep.min_tokens, keep.max_tokens)}
    problems = [
        f"{where}.keep.min_{name} must be at most {where}.keep.max_{name} (got {low} and {high})"
        for name, (low, high) in ends.items()
        if low is not None and high is not None and low > high
    ]
    if keep.difficulty is None and ends["difficulty"] != (None, None):
        problems.append(f"{where}.keep.difficulty must name a file of `rlpost difficulty`, or a column, for its bounds")
    if where != "tasks.train" and not where.startswith("tasks.more") and ends["tokens"] != (None, None):
        problems.append(f"{where}.keep.max_tokens is for training tasks: what is held out is not chosen by its length")
    if kind_of(source.path) in ("file", "hf"):
        problems += [
            f"{where}.keep.where must name columns of {where}.extra (got `{column}`, and extra has {source.extra})"
            f"{did_you_mean(column, source.extra)}"
            for column in keep.where
            if column not in source.extra
        ]
    return problems


def _mixture_problems(tasks: Tasks) -> list[str]:
    sources = tasks.sources
    problems = [
        f"{where}.weight must be > 0 (got {source.weight}): leave the source out instead"
        for where, source in sources.items()
        if source.weight is not None and not 0 < source.weight < math.inf
    ]
    without = [where for where, source in sources.items() if source.weight is None]
    if without and len(without) < len(sources):
        problems.append(f"{without[0]}.weight must be given where other sources have one (weights are shares)")
    names = [label(source) for source in sources.values()]
    problems += [
        f"{where}.name must tell it from an earlier source (both are called {name}): give it a name of its own"
        for i, (where, name) in enumerate(zip(sources, names, strict=True))
        if name in names[:i]
    ]
    return problems


def _decontaminate_problems(tasks: Tasks) -> list[str]:
    asked = tasks.decontaminate
    problems = []
    if asked.ngram is not None and asked.ngram < 1:
        problems.append(f"tasks.decontaminate.ngram must be >= 1 words, or null (got {asked.ngram})")
    if asked.near is not None and not 0 < asked.near <= 1:
        problems.append(f"tasks.decontaminate.near must be in (0, 1], or null (got {asked.near})")
    if asked.against and asked.ngram is None and asked.near is None:
        problems.append("tasks.decontaminate.against needs tasks.decontaminate.ngram or near, such as ngram=13")
    return problems


def evaluation_problems(recipe: Recipe) -> list[str]:
    """What is wrong with `evaluation`, beside the bounds of its numbers."""
    asked = recipe.evaluation
    problems = [
        f"evaluation.k must be numbers from 1 to evaluation.n (got {k} and n={asked.n}): raise n, or take it out"
        for k in asked.k
        if not 1 <= k <= asked.n
    ]
    if asked.until is not None and asked.until < asked.n:
        problems.append(f"evaluation.until must be at least evaluation.n (got {asked.until} and {asked.n})")
    if not asked.temperature and (most := max(asked.n, asked.until or 1)) > 1:
        problems.append(
            f"evaluation.n must be 1 for evaluation.temperature=0 (got {most}): greedy answers are all the same"
        )
    try:
        voter(asked.vote, "")
    except RecipeError as error:
        problems += error.problems
    if recipe.tasks.eval is None or asked.by is None or kind_of(recipe.tasks.eval.path) not in ("file", "hf"):
        return problems
    extra = recipe.tasks.eval.extra
    if asked.by not in extra:
        hint = did_you_mean(asked.by, extra)
        problems.append(
            f"evaluation.by must be one of tasks.eval.extra (got `{asked.by}`, and extra has {extra}){hint}"
        )
    return problems
