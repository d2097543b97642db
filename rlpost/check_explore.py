"""What a recipe's `explore` list must be, and what it needs of the rest."""

from __future__ import annotations

from typing import Any

from rlpost.errors import RecipeError, RunError
from rlpost.explorers import GIVEN_TO_EXPLORERS, HOME, bind_explorer
from rlpost.plugins import USER_CODE_ERRORS, user_error
from rlpost.recipe import Recipe
from rlpost.tasks import kind_of

CENTRED = ("grpo", "dr_grpo")
"""Advantages that can be taken against the policy's own rewards."""
CENTRED_IN_GROUP = ("grpo", "dr_grpo", "rloo", "batch_std")
"""Advantages that are 0 at the group's mean."""
NEEDS_SCORES = ("gae", "reinforce_pp")
"""Advantages for which the model must see every rollout, trained or not."""


def explore_problems(recipe: Recipe) -> list[str]:
    """Every problem of `explore` that shows without loading a model, one line each."""
    problems = []
    for i, plugin in enumerate(recipe.explore):
        problems += _explorer(plugin, i)
        if plugin.get("use") == "guide":
            problems += _hints(recipe, plugin, i)
        if plugin.get("use") == "expert":
            problems += _expert(recipe, plugin, i)
        if plugin.get("use") == "broaden" and plugin.get("train"):
            problems += _sampled(recipe, plugin, i)
    return [*problems, *_statistics(recipe), *_widths(recipe)]


def _explorer(plugin: Any, i: int) -> list[str]:
    """A name that can be found, parameters that fit it, and a class that can be asked for more."""
    try:
        bound = bind_explorer(plugin, i)
    except RecipeError as error:
        return error.problems
    if not hasattr(bound.func, "more"):
        return [f"explore.{i}.use: `{plugin['use']}` must be a class with the method `more(group)`"]
    if not bound.func.__module__.startswith(HOME):
        return []
    names = bound.func.__init__.__code__.co_varnames
    try:  # a shipped one looks at its parameters when it is made, and at nothing else
        bound(**dict.fromkeys(GIVEN_TO_EXPLORERS & set(names)))
    except RunError as error:
        return [str(error).replace("explore: ", f"explore.{i}: ", 1)]
    except USER_CODE_ERRORS as error:
        return [f"explore.{i}: `{plugin['use']}` cannot be made with these parameters ({user_error(error)})"]
    return []


def _hints(recipe: Recipe, plugin: dict[str, Any], i: int) -> list[str]:
    """Tasks from a file must have the columns that hints are taken from; other sources bring what they have."""
    source, needs = plugin.get("source", "column"), f"explore.{i}: guide.source={plugin.get('source', 'column')} needs"
    lacks = {
        "column": ("hints", ", the columns that hold hints from weak to strong (got none): name them"),
        "solution": ("solution", ", the column with a worked solution (got none): name it"),
        "answer": ("answer", " (got null): name the column"),
    }
    if source not in lacks:
        return []
    field, rest = lacks[source]
    return [f"{needs} {where}.{field}{rest}" for where, one in recipe.tasks.sources.items() if not getattr(one, field)]


def _expert(recipe: Recipe, plugin: dict[str, Any], i: int) -> list[str]:
    field = plugin.get("field")
    sources = recipe.tasks.sources.items()
    if not field:
        return [
            f"explore.{i}: expert needs {where}.solution, the column with a worked solution (got none): name it or "
            "expert.field"
            for where, one in sources
            if not one.solution
        ]
    return [
        f"explore.{i}: expert.field must be one of {where}.extra (got `{field}`, and extra has {one.extra})"
        for where, one in sources
        if field not in one.extra and kind_of(one.path) in ("file", "hf")
    ]


def _sampled(recipe: Recipe, plugin: dict[str, Any], i: int) -> list[str]:
    algorithm = recipe.algorithm
    use = algorithm.advantage.get("use")
    if use in NEEDS_SCORES:
        return [
            f"explore.{i}: broaden.train must be 0 for algorithm.advantage.use={use}: a rollout that is not trained is "
            "not scored by the model either, and this advantage needs that of all"
        ]
    if plugin.get("rule") == "spread" and use not in CENTRED_IN_GROUP:
        return [
            f"explore.{i}: broaden.rule must be balanced or random for algorithm.advantage.use={use} (got spread): a "
            "rollout at its group's mean is never drawn, and must have no advantage there"
        ]
    if algorithm.kl.coef and algorithm.kl.place == "reward":
        return [f"explore.{i}: broaden.train must be 0 for algorithm.kl.place=reward: use algorithm.kl.place=loss"]
    return []


def _statistics(recipe: Recipe) -> list[str]:
    off_policy, use = recipe.algorithm.off_policy, recipe.algorithm.advantage.get("use")
    if off_policy.statistics == "policy" and use not in CENTRED:
        return [
            f"algorithm.off_policy.statistics must be pooled or role for algorithm.advantage.use={use} (got policy): "
            f"only {' and '.join(CENTRED)} can be taken against other rewards"
        ]
    return []


def _widths(recipe: Recipe) -> list[str]:
    problems = []
    rollouts, lr_rollouts = recipe.algorithm.minibatch_rollouts, recipe.engine.lr_rollouts
    if rollouts is not None and recipe.algorithm.minibatches != 1:
        problems.append(
            f"algorithm.minibatches must be 1 with algorithm.minibatch_rollouts (got {recipe.algorithm.minibatches} "
            f"and {rollouts}): one says how many optimizer steps, the other how large they are"
        )
    for key, value in (("algorithm.minibatch_rollouts", rollouts), ("engine.lr_rollouts", lr_rollouts)):
        if value is not None and value < 1:
            problems.append(f"{key} must be >= 1, or null (got {value})")
    if recipe.explore_budget.waves < 0:
        problems.append(f"explore_budget.waves must be >= 0 (got {recipe.explore_budget.waves})")
    if recipe.explore_budget.rollouts is not None and recipe.explore_budget.rollouts < 0:
        problems.append(f"explore_budget.rollouts must be >= 0, or null (got {recipe.explore_budget.rollouts})")
    return problems
