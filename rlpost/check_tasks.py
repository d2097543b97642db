"""What the `tasks` and `evaluation` sections must be."""

from __future__ import annotations

from rlpost.errors import RecipeError
from rlpost.plugins import did_you_mean
from rlpost.recipe import Recipe
from rlpost.sources import kind_of, source_problems
from rlpost.votes import voter


def task_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the sources of tasks, as far as it shows without reading them."""
    tasks = recipe.tasks
    problems = source_problems(tasks.train, "tasks.train")
    return problems if tasks.eval is None else problems + source_problems(tasks.eval, "tasks.eval")


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
