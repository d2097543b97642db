"""What the tasks of a recipe are: how many, how long, how alike, and what was left out on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlpost.chosen import quantiles
from rlpost.decontaminate import SHINGLE, Overlap, counted, decontaminated, overlaps, text_of
from rlpost.duplicates import near_duplicates
from rlpost.recipe import Recipe
from rlpost.sources import kind_of, read_rows
from rlpost.task_filters import kept, label, of_length
from rlpost.task_recipe import Keep, TaskSource
from rlpost.tasks import check_overlap, drops_duplicates, load_against, load_tasks, load_training
from rlpost.types import Task

if TYPE_CHECKING:
    from rlpost.render import Renderer

NEAR, NGRAM = 0.8, 13
"""What is looked for where the recipe does not say."""
SHOWN = 3
FEW = 12
"""A column with at most so many values is shown with its counts."""
Lengths = Callable[[Task], int]


def report_of(recipe: Recipe, renderer: Renderer | None = None, *, near: bool = True) -> dict[str, Any]:
    """Statistics of every source, of what they make together, and of what they share with the held-out problems.

    Lengths are in tokens with a renderer, else in words. `near`: compare all training prompts with each other.
    """
    asked, where_eval = recipe.tasks, "tasks.eval"
    length: Lengths = (lambda task: len(text_of(task).split())) if renderer is None else _tokens(renderer)
    held_out = load_tasks(asked.eval, where_eval) if asked.eval is not None else []
    against = [*held_out, *load_against(recipe)]
    sources = {where: _of_source(source, where, length) for where, source in asked.sources.items()}
    together = load_training(recipe)
    apart = check_overlap(together, held_out, drop=drops_duplicates(asked.train))
    clean = decontaminated(apart, against, asked.decontaminate)
    used = clean if renderer is None else of_length(clean, asked.sources, renderer)
    shares = _shares(used, asked.sources)
    for source in sources.values():
        source["used"], source["share"] = shares[source["name"]]
    looked = replace(
        asked.decontaminate, ngram=asked.decontaminate.ngram or NGRAM, near=asked.decontaminate.near or NEAR
    )
    found = overlaps(together, against, looked) if against else []
    return {
        "unit": "words" if renderer is None else "tokens",
        "sources": sources,
        "eval": None if asked.eval is None else _statistics(held_out, length) | {"name": label(asked.eval)},
        "used": len(used),
        "funnel": {"of all sources": len(together), "not held out": len(apart), "decontaminated": len(clean)}
        | ({} if renderer is None else {"of the length": len(used)}),
        "overlap": _overlap(found, together, against, looked.ngram, looked.near),
        "near_duplicates": _near(used) if near else None,
    }


def _tokens(renderer: Renderer) -> Lengths:
    return lambda task: len(renderer.prompt_ids(task))


def _of_source(source: TaskSource, where: str, length: Lengths) -> dict[str, Any]:
    rows = sum(1 for _ in read_rows(source, where))
    whole = load_tasks(replace(source, keep=Keep(), duplicates="drop"), where)
    filtered = kept(whole, source.keep, where)
    said = {"name": label(source), "kind": kind_of(source.path), "rows": rows, "distinct": len(whole)}
    return said | {"kept": len(filtered), "weight": source.weight} | _statistics(filtered, length)


def _statistics(tasks: Sequence[Task], length: Lengths) -> dict[str, Any]:
    """Lengths at the quantiles 0, .1, .25, .5, .75, .9, 1; what answers look like; columns with few values."""
    answers = Counter(task.answer for task in tasks if task.answer is not None)
    numbers = sum(count for answer, count in answers.items() if _is_number(answer))
    columns: dict[str, Counter[str]] = {}
    for task in tasks:
        for name, value in task.extra.items():
            columns.setdefault(name, Counter())[str(value)] += 1
    return {
        "tasks": len(tasks),
        "prompt_length": quantiles([float(length(task)) for task in tasks]),
        "numeric_answers_frac": numbers / answers.total() if answers else None,
        "most_frequent_answers": dict(answers.most_common(SHOWN)),
        "with_solution_frac": sum(task.solution is not None for task in tasks) / max(1, len(tasks)),
        "with_hints_frac": sum(bool(task.hints) for task in tasks) / max(1, len(tasks)),
        "columns": {name: dict(counts.most_common()) for name, counts in columns.items() if len(counts) <= FEW},
    }


def _shares(used: Sequence[Task], sources: Mapping[str, TaskSource]) -> dict[str, tuple[int, float]]:
    """Of each source: the tasks that are left of it, and its share of a step."""
    counts = Counter(task.source for task in used)
    weights = {label(source): source.weight for source in sources.values()}
    whole = sum(weight or 0.0 for weight in weights.values())
    pooled = any(weight is None for weight in weights.values())
    return {
        name: (counts[name], counts[name] / len(used) if pooled else (weight or 0.0) / whole)
        for name, weight in weights.items()
    }


def _overlap(
    found: Sequence[Overlap], train: Sequence[Task], held_out: Sequence[Task], ngram: int | None, near: float | None
) -> dict[str, Any]:
    texts = {task.key: text_of(task) for task in (*held_out, *train)}
    worst = sorted(found, key=lambda one: -one.share)[:SHOWN]
    pairs = [{"share": one.share, "train": texts[one.train], "held_out": texts[one.held_out]} for one in worst]
    return {"ngram": ngram, "near": near, "held_out": len(held_out), "tasks": dict(counted(found)), "most": pairs}


def _near(tasks: Sequence[Task]) -> dict[str, Any]:
    texts = [text_of(task) for task in tasks]
    found = [
        (i, one) for i, one in enumerate(near_duplicates(texts, threshold=NEAR, shingle=SHINGLE)) if one is not None
    ]
    most = sorted(found, key=lambda pair: -pair[1].similarity)[:SHOWN]
    pairs = [{"similarity": one.similarity, "first": texts[one.place], "again": texts[i]} for i, one in most]
    return {"threshold": NEAR, "tasks": len(found), "most": pairs}


def _is_number(answer: str) -> bool:
    from rewards._numbers import as_number

    return as_number(answer) is not None
