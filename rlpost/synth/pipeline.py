"""The stages in their order, what each is given, and how one is run.

identify -> train -> sample -> screen ... -> distil -> filters ... -> problems.jsonl, quarantine.jsonl, funnel.json
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.plugins import USER_CODE_ERRORS, bind, user_error
from rlpost.recipe import Recipe
from rlpost.synth.bench import Bench, departures, shape_of
from rlpost.synth.rows import Row
from rlpost.synth.store import Part, check_head, digest, head_of, is_done, read

STAGES, FILTERS = "rlpost.synth.stages", "rlpost.synth.filters"


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    >>> Stage("distil", "distil", {"use": "teacher"}, "synth.distil").package
    'rlpost.synth.stages'
    """

    name: str
    """Its folder."""
    kind: str
    """`identify`, `train`, `sample`, `distil`, or `screen` and `filters` for a filter."""
    plugin: dict[str, Any]
    where: str
    """Its recipe key."""

    @property
    def is_filter(self) -> bool:
        """Whether its rows are verdicts."""
        return self.kind in ("screen", "filters")

    @property
    def package(self) -> str:
        """Where bare names are looked up."""
        return FILTERS if self.is_filter else STAGES

    def bound(self) -> Any:
        """The plug-in with its parameters: a stage takes rows and a bench, a filter one row, or its class a bench."""
        return bind(self.plugin, self.package, where=self.where, skip=1 if self.is_filter else 2)

    @property
    def uses_model(self) -> bool:
        """Whether it needs torch and, mostly, vLLM: a process of its own. A user's stage does; a user's filter says."""
        function = self.bound().func
        if self.is_filter:
            return bool(getattr(function, "uses_model", False))
        home = inspect.getmodule(function)
        return bool(getattr(home, "uses_model", True))


def stages_of(recipe: Recipe) -> list[Stage]:
    """Every stage of a recipe, in order."""
    synth = recipe.synth
    if synth is None:
        raise RunError("synth must say how problems are made (the recipe has no such section): add `synth: {}`")

    def one(name: str) -> Stage:
        return Stage(name, name, getattr(synth, name), f"synth.{name}")

    def several(kind: str) -> list[Stage]:
        plugins = getattr(synth, kind)
        names = [str(plugin.get("use")).rpartition(":")[2] for plugin in plugins]
        named = zip(names, plugins, strict=True)
        return [
            Stage(f"{kind}-{i}-{name}", kind, plugin, f"synth.{kind}.{i}") for i, (name, plugin) in enumerate(named)
        ]

    return [one("identify"), one("train"), one("sample"), *several("screen"), one("distil"), *several("filters")]


def synth_folder(recipe: Recipe) -> Path:
    """Where a recipe's synthesis is kept."""
    return Path(recipe.run_dir) / str(recipe.name) / "synth"


def is_finished(stage: Stage, folder: Path) -> bool:
    """Whether a stage has nothing left to do."""
    if stage.kind == "train":
        return (folder / "train" / "generator.json").exists()
    return is_done(folder / stage.name)


def check_finished(stage: Stage, recipe: Recipe, folder: Path) -> None:
    """Raise where a stage that is whole was made with other settings than these."""
    check_head(folder / stage.name, head(stage, stages_of(recipe), recipe, folder))


def head(stage: Stage, stages: Sequence[Stage], recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a stage's rows follow from: its settings, the models it names, and everything before it."""
    before = stages[stages.index(stage) - 1] if stage.name != "identify" else None
    model = stage.plugin.get("model")
    made: dict[str, Any] = {"stage": stage.name, "settings": dict(stage.plugin), "seed": recipe.seed}
    if before is None:
        made["tasks"] = departures(recipe.tasks)
    else:
        made["after"] = digest(head_of(folder / before.name))
    if stage.uses_model and "endpoint" not in stage.plugin:
        made["model"] = shape_of(str(model or "policy"), recipe)
    return made


def rows_for(stage: Stage, stages: Sequence[Stage], bench: Bench) -> Iterator[Row]:
    """What a stage is given, row by row."""
    folder = bench.folder
    if stage.kind == "identify":
        from rlpost.synth.filters.near_duplicates import text_of
        from rlpost.tasks import load_task_sets

        for task in load_task_sets(bench.recipe)[0]:
            yield {"id": task.key, "prompt": text_of(task), "answer": task.answer, "solution": task.solution}
    elif stage.kind == "train":
        yield from (row for row in read(folder / "identify") if row["difficult"])
    elif stage.kind == "sample":
        number = int(stage.plugin.get("number", _default(stage, "number")))
        batch = digest([head_of(folder / "train"), stage.plugin, bench.seed])[:8]
        yield from ({"id": f"{batch}-{i:06d}", "seed": (bench.seed << 32) + i} for i in range(number))
    else:
        base = "sample" if stage.kind in ("screen", "distil") else "distil"
        gone = rejected(stages[: stages.index(stage)], folder)
        yield from (row for row in read(folder / base) if row["id"] not in gone)


def rejected(stages: Iterable[Stage], folder: Path) -> dict[str, tuple[str, str]]:
    """Id -> (filter, reason) of every row that a filter of these has taken out."""
    found: dict[str, tuple[str, str]] = {}
    for stage in stages:
        if stage.is_filter:
            found |= {row["id"]: (stage.name, row["reason"]) for row in read(folder / stage.name) if row["reason"]}
    return found


def run_stage(stage: Stage, recipe: Recipe, bench: Bench, *, part: int = 0, parts: int = 1) -> int:
    """Do what is left of a stage's part; how many rows that were."""
    stages = stages_of(recipe)
    made = head(stage, stages, recipe, bench.folder)
    if stage.kind == "train":
        return _train(stage, made, bench, list(rows_for(stage, stages, bench)))
    if stage.is_filter and not stage.uses_model and parts > 1:
        raise RunError(f"synth: the stage {stage.name} uses no model and runs as a whole: start it without --part")
    file = Part(bench.folder / stage.name, part=part, parts=parts)
    done = file.open(made)
    if file.is_done:
        return 0
    started = time.monotonic()
    mine = (row for i, row in enumerate(rows_for(stage, stages, bench)) if i % parts == part)
    count = file.write(_answered(stage, mine, done, bench))
    file.finish(count, time.monotonic() - started)
    return count


def _answered(stage: Stage, mine: Iterator[Row], done: set[str], bench: Bench) -> Iterator[Row]:
    """What the plug-in makes of the rows that are not done, one for each, whatever their order."""
    given: set[str] = set()
    bound = stage.bound()
    ready = bound(bench) if inspect.isclass(bound.func) else None

    def left() -> Iterator[Row]:
        for row in mine:
            if row["id"] not in done:
                given.add(row["id"])
                yield row
            elif ready is not None and hasattr(ready, "seen"):
                ready.seen(row)

    for row in _called(stage, bound, ready, left(), bench):
        if not isinstance(row, dict) or row.get("id") not in given:
            raise RunError(
                f"{stage.where}.use: `{stage.plugin['use']}` must yield each row that it is given once, with its `id` "
                f"(got {str(row)[:80]})"
            )
        given.remove(row["id"])
        yield row
    if given:
        raise RunError(
            f"{stage.where}.use: `{stage.plugin['use']}` must yield a row for each that it is given ({len(given)} are "
            f"missing, such as {min(given)})"
        )


def _called(stage: Stage, bound: Callable[..., Any], ready: Any, left: Iterator[Row], bench: Bench) -> Iterator[Row]:
    if not stage.is_filter:
        yield from bound(left, bench)
    elif ready is not None:
        yield from ready.stream(left)
    else:
        for row in left:
            try:
                reason = bound(row)
            except USER_CODE_ERRORS as error:
                raise RunError(f"{stage.where}.use: failed at {row['id']}: {user_error(error)}") from error
            yield {"id": row["id"], "reason": reason}


def _train(stage: Stage, made: dict[str, Any], bench: Bench, rows: list[Row]) -> int:
    """The generator, made where it is not there yet."""
    part = Part(bench.folder / "train")
    main = bench.world is None or bench.world.is_main
    if main:
        part.open(made)
    if not rows:
        raise RunError(
            "synth.identify must find difficult problems to train a generator on (it found none): lower "
            "synth.identify.at_least, or give it harder tasks"
        )
    said = stage.bound()(rows, bench)
    path = bench.folder / "train" / "generator.json"
    if main and not path.exists():
        whole = path.with_name("generator.json.tmp")
        whole.write_text(json.dumps(said, indent=2) + "\n")
        whole.replace(path)
    return len(rows)


def _default(stage: Stage, name: str) -> Any:
    return inspect.signature(stage.bound().func).parameters[name].default
