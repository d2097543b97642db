from dataclasses import asdict

import pytest

from rlpost.changes import GONE, check_changes, differences, is_harmless
from rlpost.errors import RunError
from rlpost.recipe import EngineRecipe, Evaluation, Recipe


def test_equal_recipes_have_nothing_to_tell():
    assert check_changes(asdict(Recipe(seed=3, run_dir="here")), Recipe(seed=3, resume="auto")) is None
    assert check_changes(asdict(Recipe()), Recipe(keep_every=5)) == (
        "resume: the recipe differs from that of the checkpoint only in files, speed or memory:\n  keep_every: 0 -> 5"
    )


def test_lists_are_compared_by_place_and_what_is_gone_is_said():
    saved = asdict(Recipe(rewards=[{"use": "a"}, {"use": "b", "weight": 2.0}]))
    found = differences(saved, Recipe(rewards=[{"use": "a", "weight": 1.5}]))
    assert found == {
        "rewards.0.weight": (GONE, 1.5),
        "rewards.1.use": ("b", GONE),
        "rewards.1.weight": (2.0, GONE),
    }


@pytest.mark.parametrize(
    ("key", "recipe", "harmless"),
    [
        ("engine.zero_stage", Recipe(), True),
        ("logging.wandb", Recipe(), True),
        ("evaluation.n", Recipe(evaluation=Evaluation(every=3)), True),
        ("engine.lr", Recipe(), False),
        ("prompts_per_step", Recipe(), False),
        ("model.path", Recipe(), False),
        ("steps", Recipe(), True),
        ("steps", Recipe(engine=EngineRecipe(schedule="cosine")), False),
    ],
)
def test_what_leaves_the_numbers_alone_is_harmless(key, recipe, harmless):
    assert is_harmless(key, recipe) is harmless


def test_evaluations_that_steer_the_run_are_not_harmless():
    recipe = Recipe()
    recipe.algorithm.kl.reset.patience = 2
    assert not is_harmless("evaluation.every", recipe)
    with pytest.raises(RunError, match=r"another evaluation\.every\).*\n  evaluation\.every: 5 -> 0"):
        check_changes({**asdict(recipe), "evaluation": {**asdict(recipe.evaluation), "every": 5}}, recipe)
