"""The recipe's rollout function: named, with its parameters, and checked."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from rlpost.errors import RecipeError
from rlpost.plugins import bind
from rlpost.recipe import Recipe


def bind_rollout(recipe: Recipe) -> Callable[[Any], Awaitable[None]] | None:
    """The function that leads every answer, its parameters filled in; None: one call of the generator makes it."""
    if recipe.rollout is None:
        return None
    bound = bind(recipe.rollout, "rlpost.turns", where="rollout", skip=1)
    if not inspect.iscoroutinefunction(inspect.unwrap(bound.func)):
        found = "a class" if inspect.isclass(bound.func) else "a plain function"
        raise RecipeError(
            [
                f"rollout.use must be a coroutine function, `async def name(talk, *, parameter=...)` (got {found}, "
                f"`{recipe.rollout['use']}`): it awaits talk.generate"
            ]
        )
    return bound


def rollout_problems(recipe: Recipe) -> list[str]:
    """Everything that is wrong with the section `rollout`."""
    problems = []
    try:
        bind_rollout(recipe)
    except RecipeError as error:
        problems += error.problems
    if recipe.rollout is not None and recipe.algorithm.interruption.text is not None:
        problems.append(
            "algorithm.interruption.text must be null with rollout (got both): the rollout function decides what "
            "follows an answer that was cut off; ask once more with talk.generate there, or leave rollout out"
        )
    if recipe.rollout is not None and recipe.generator.partial_tokens is not None:
        problems.append(
            f"generator.partial_tokens must be null with rollout (got {recipe.generator.partial_tokens}): an answer "
            "that waits for a tool cannot be kept for a later step; leave one of them out"
        )
    return problems
