"""How many rollouts a step trains, into how many optimizer steps they go, and what that does to the learning rate."""

from __future__ import annotations

import math

from rlpost.recipe import Recipe


def generated_a_prompt(recipe: Recipe) -> int:
    """Rollouts of a prompt, as the recipe asks: the group size, or the width of `broaden`; hints come on top."""
    widths = [int(one.get("width", 512)) for one in recipe.explore if one.get("use") == "broaden"]
    return max([recipe.sampling.group_size, *widths])


def trained_a_prompt(recipe: Recipe) -> int:
    """Those of them that are trained: all, or the sample of `broaden`."""
    samples = [int(one.get("train") or 0) for one in recipe.explore if one.get("use") == "broaden"]
    return min([generated_a_prompt(recipe), *(sample for sample in samples if sample)])


def trained_a_step(recipe: Recipe) -> int:
    """Rollouts of a step that are trained, over all ranks, where every group is kept."""
    return recipe.prompts_per_step * trained_a_prompt(recipe)


def updates_a_step(recipe: Recipe) -> int:
    """Optimizer steps of one pass over a step's rollouts.

    `algorithm.minibatches`, however many rollouts there are (BroRL), or as many as `minibatch_rollouts` makes.
    """
    rollouts = recipe.algorithm.minibatch_rollouts
    return recipe.algorithm.minibatches if rollouts is None else max(1, round(trained_a_step(recipe) / rollouts))


def lr_scale(recipe: Recipe) -> float:
    """sqrt(B / B0): B rollouts of a step, and B0 that the learning rate was chosen for. BroRL, arXiv:2510.01180.

    >>> from rlpost.recipe import EngineRecipe
    >>> recipe = Recipe(prompts_per_step=128, explore=[{"use": "broaden"}], engine=EngineRecipe(lr_rollouts=8192))
    >>> round(lr_scale(recipe), 3)
    2.828
    """
    chosen_for = recipe.engine.lr_rollouts
    return 1.0 if chosen_for is None else math.sqrt(trained_a_step(recipe) / chosen_for)
