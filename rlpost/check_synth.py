"""What a recipe's `synth` section must be."""

from __future__ import annotations

import inspect
from typing import Any

from rlpost.errors import RecipeError, RunError
from rlpost.plugins import USER_CODE_ERRORS, bind
from rlpost.recipe import Recipe

_POSITIVE = ("number", "k", "n", "votes", "max_new_tokens", "epochs", "batch_size", "lr", "lora_rank")
_SHARES = ("top_p",)


def synth_problems(recipe: Recipe) -> list[str]:
    """Every problem of `synth` that shows without loading a model, one line each."""
    if recipe.synth is None:
        return []
    from rlpost.synth.pipeline import stages_of

    problems = []
    for stage in stages_of(recipe):
        try:
            bound = stage.bound()
        except RecipeError as error:
            problems += error.problems
            continue
        if stage.is_filter and inspect.isclass(bound.func) and not hasattr(bound.func, "stream"):
            problems.append(f"{stage.where}.use: `{stage.plugin['use']}` must be a function, or a class with `stream`")
        problems += _values(stage.plugin, stage.where)
        problems += _model(stage.plugin, stage.where, recipe)
    return [*problems, *_online(recipe)]


def _values(plugin: dict[str, Any], where: str) -> list[str]:
    numbers = {key: value for key, value in plugin.items() if isinstance(value, int | float)}
    problems = [
        f"{where}.{key} must be > 0 (got {numbers[key]})" for key in _POSITIVE if key in numbers and numbers[key] <= 0
    ]
    problems += [
        f"{where}.{key} must be in (0, 1] (got {numbers[key]})"
        for key in _SHARES
        if key in numbers and not 0 < numbers[key] <= 1
    ]
    if numbers.get("temperature", 0) < 0:
        problems.append(f"{where}.temperature must be >= 0 (got {numbers['temperature']})")
    return problems


def _model(plugin: dict[str, Any], where: str, recipe: Recipe) -> list[str]:
    """A model that is a recipe must be one that can be read."""
    model = plugin.get("model")
    if not isinstance(model, str) or not model.endswith((".yaml", ".yml")):
        return []
    from rlpost.synth.bench import recipe_of

    try:
        recipe_of(model, recipe)
    except RecipeError as error:
        return [f"{where}.model: {model}: {problem}" for problem in error.problems]
    except (RunError, *USER_CODE_ERRORS) as error:
        return [f"{where}.model: {model} cannot be read ({error})"]
    return []


def _online(recipe: Recipe) -> list[str]:
    online = recipe.synth.online if recipe.synth else None
    if online is None:
        return []
    problems = [
        f"synth.online.{key} must be > 0 (got {getattr(online, key)})"
        for key in ("every", "seeds", "number", "most", "measure", "budget")
        if getattr(online, key) <= 0
    ]
    problems += [
        f"synth.online.{key} must be in [0, 1] (got {getattr(online, key)})"
        for key in ("below", "share", "diversity", "drop")
        if not 0 <= getattr(online, key) <= 1
    ]
    try:
        curriculum = bind(recipe.curriculum, "curricula", where="curriculum", skip=1, supplied=("seed",)).func
    except RecipeError:
        return problems  # which is said elsewhere
    if inspect.isclass(curriculum) and not hasattr(curriculum, "add"):
        problems.append(f"synth.online needs a curriculum with `add` (got {recipe.curriculum['use']}): try learnable")
    return problems
