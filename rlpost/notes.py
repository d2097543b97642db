"""What is to be said of a recipe that can be run as it is, and would run better otherwise; one line each."""

from __future__ import annotations

from collections.abc import Iterator

from rlpost.recipe import Recipe


def of_machine(recipe: Recipe) -> Iterator[str]:
    """On the machine that runs it."""
    from rlpost.devices import multiplies_bfloat16

    if recipe.model.dtype == "bfloat16" and not multiplies_bfloat16():
        yield (
            "model.dtype=bfloat16 is slow here, as this CPU has no instructions for it (products took 9 times as long "
            "as in float32 where it was measured): model.dtype=float32 is faster, in twice the memory"
        )


def of_recipe(recipe: Recipe) -> Iterator[str]:
    """On any machine.

    >>> recipe = Recipe()
    >>> recipe.generator.max_staleness, recipe.algorithm.mismatch.mode = 1, "decoupled"
    >>> [note.split(":")[0] for note in of_recipe(recipe)]
    ['generator.max_staleness=1 with algorithm.mismatch.mode=decoupled and no algorithm.mismatch.weights']
    """
    mismatch, generator = recipe.algorithm.mismatch, recipe.generator
    older = {"generator.max_staleness": generator.max_staleness, "generator.partial_tokens": generator.partial_tokens}
    for key, value in older.items():
        if value and mismatch.mode == "decoupled" and not mismatch.weights:
            yield (
                f"{key}={value} with algorithm.mismatch.mode=decoupled and no algorithm.mismatch.weights: what older "
                "weights wrote is taken for the policy's own, which undid what was learned where it was measured "
                "(results/pipeline.md); with mode=bypass the bounds of the loss are around the weights that wrote it"
            )
