"""What rollouts that are made ahead, in parts, or ended early need of the rest of a recipe."""

from __future__ import annotations

from rlpost.recipe import Recipe


def pipeline_problems(recipe: Recipe) -> list[str]:
    """Every problem of staleness, partial rollouts and repetition, one line each."""
    return [*_ahead(recipe), *_partial(recipe), *_repeats(recipe)]


def _ahead(recipe: Recipe) -> list[str]:
    generator, algorithm = recipe.generator, recipe.algorithm
    problems = []
    if generator.first_come and generator.max_staleness < 2:
        problems.append(
            "generator.first_come needs room for overtaking: generator.max_staleness must be at least 2 (got "
            f"{generator.max_staleness})"
        )
    if generator.first_come and algorithm.groups.without_spread == "refill":
        problems.append(
            "generator.first_come counts the groups of a step, and algorithm.groups.without_spread=refill asks for "
            "more of them: use drop or keep, or first_come=false"
        )
    if generator.first_come and algorithm.advantage.get("use") == "remax":
        problems.append(
            "generator.first_come and algorithm.advantage=remax do not go together, as a group is whole only with its "
            "greedy answer: use first_come=false"
        )
    return problems


def _partial(recipe: Recipe) -> list[str]:
    generator, algorithm = recipe.generator, recipe.algorithm
    part, key = generator.partial_tokens, f"generator.partial_tokens={generator.partial_tokens}"
    if part is None:
        return []
    problems = []
    if not 0 < part < recipe.sampling.max_new_tokens:
        problems.append(
            f"generator.partial_tokens must be in (0, sampling.max_new_tokens) (got {part} of "
            f"{recipe.sampling.max_new_tokens}): null writes whole answers"
        )
    refused = {
        "generator.max_staleness": generator.max_staleness > 0,
        "algorithm.groups.without_spread=refill": algorithm.groups.without_spread == "refill",
        "algorithm.interruption.text": algorithm.interruption.text is not None,
        "algorithm.advantage=remax": algorithm.advantage.get("use") == "remax",
    }
    return problems + [
        f"{key} and {name} do not go together (a step does not know its answers' ends): leave one of them out"
        for name, is_set in refused.items()
        if is_set
    ]


def _repeats(recipe: Recipe) -> list[str]:
    sampling = recipe.sampling
    if sampling.repeats is None or (sampling.repeats >= 2 and sampling.repeat_tokens >= 1):
        return []
    return [
        f"sampling.repeats must be at least 2 and sampling.repeat_tokens at least 1 (got {sampling.repeats} and "
        f"{sampling.repeat_tokens}): null lets answers repeat themselves"
    ]
