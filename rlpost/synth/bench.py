"""What every stage is given beside its rows: the recipe, the folder, and models by their name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError
from rlpost.recipe import Prompting, Recipe
from rlpost.synth.store import digest

if TYPE_CHECKING:
    from rlpost.generate.writers import FrozenVllm, Writer
    from rlpost.world import World


@dataclass(frozen=True)
class Bench:
    """The surroundings of a stage."""

    recipe: Recipe
    world: World | None
    """None in stages without a model."""
    folder: Path
    """Of the run's synthesis."""
    writers: list[Writer] = field(default_factory=list, init=False)
    """Those that were asked for, to be closed."""

    @property
    def seed(self) -> int:
        """The recipe's."""
        return self.recipe.seed

    def writer(self, model: str, endpoint: str | None = None) -> Writer:
        """Whoever writes as `model`: here, or with `endpoint` behind a server that knows it by that name."""
        from rlpost.generate.writers import Endpoint

        if endpoint is None:
            return self.local(model)
        self.writers.append(served := Endpoint(endpoint, model))
        return served

    def close(self) -> None:
        """End whoever wrote."""
        for writer in self.writers:
            writer.close()
        self.writers.clear()

    def local(self, model: str, *, prompting: Prompting | None = None) -> FrozenVllm:
        """vLLM with `model`; a process has one.

        `policy` is the recipe's own model, after its `sft` section; a `.yaml` file is the model of that recipe, in the
        same way; anything else is a folder or a name on the hub.
        """
        from rlpost.generate.writers import FrozenVllm
        from rlpost.run import make_renderer

        recipe, folder = self.folder_of(model)
        if prompting is not None:
            recipe = replace(recipe, tasks=replace(recipe.tasks, prompting=prompting))
        writer = FrozenVllm(recipe, folder, make_renderer(recipe, folder), self._world())
        self.writers.append(writer)
        return writer

    def folder_of(self, model: str) -> tuple[Recipe, Path]:
        """The recipe that `model` is read with, and its folder, made where it has to be trained first."""
        from rlpost.model_source import model_folder
        from rlpost.sft import base_model

        recipe = recipe_of(model, self.recipe)
        world = self._world()
        return recipe, base_model(recipe, world) if recipe.sft else model_folder(recipe, world)

    def _world(self) -> World:
        if self.world is None:
            raise RunError("synth: a stage that uses a model must say so: `uses_model = True` on a filter's class")
        return self.world


def recipe_of(model: str, recipe: Recipe) -> Recipe:
    """The recipe that describes `model`, with this one's generator and precision."""
    if model == "policy":
        return recipe
    if model.endswith((".yaml", ".yml")):
        from rlpost.recipe import load

        return replace(load(model), run_dir=recipe.run_dir, generator=recipe.generator, seed=recipe.seed)
    alone = replace(recipe.model, path=model, init=None, lora=None, context=None)
    return replace(recipe, model=alone, sft=None)


def shape_of(model: str, recipe: Recipe) -> str:
    """What tells one model from another, without loading it."""
    found = recipe_of(model, recipe)
    return digest([departures(found.model), departures(found.sft), found.seed])


def departures(section: Any) -> Any:
    """A section of a recipe as plain values, without what stands at its default: a field that is new changes nothing.

    >>> departures(Prompting(suffix="?"))
    {'suffix': '?'}
    """
    if not is_dataclass(section) or isinstance(section, type):
        return section
    plain = type(section)()
    pairs = [(field.name, getattr(section, field.name), getattr(plain, field.name)) for field in fields(section)]
    return {name: departures(value) for name, value, default in pairs if value != default}
