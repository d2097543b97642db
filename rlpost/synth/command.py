"""`rlpost synth`: one stage after the other, those with a model in processes of their own.

In one process the end of a vLLM would take the ranks' process group with it, and the memory of two models.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import Preempted, RunError
from rlpost.preempt import PREEMPTED, preemption
from rlpost.recipe import Recipe
from rlpost.synth.bench import Bench
from rlpost.synth.collect import FUNNEL, PROBLEMS, QUARANTINE, collect, picture, table
from rlpost.synth.pipeline import Stage, check_finished, is_finished, run_stage, stages_of, synth_folder

if TYPE_CHECKING:
    from rlpost.world import World


def run_synth(options: argparse.Namespace) -> None:
    """Every stage that is left, or one of them."""
    from rlpost.__main__ import checked

    recipe = checked(options)
    stages = stages_of(recipe)
    if options.stage is not None:
        run_one(named(options.stage, stages), recipe, *part_of(options.part))
        return
    if options.part != "0/1":
        raise RunError("--part belongs to one stage: name it with --stage")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("rlpost synth runs on one rank: start it without torchrun, or one --stage train with it")
    folder = synth_folder(recipe)
    for stage in stages:
        run_in_its_place(stage, recipe, [options.recipe, *options.overrides])
    found = collect(stages, folder)
    picture(found, folder / "funnel.png")
    print(table(found))
    print(f"problems: {folder / PROBLEMS} ({found[-1]['out']}); the others: {folder / QUARANTINE}; {folder / FUNNEL}")


def named(name: str, stages: Sequence[Stage]) -> Stage:
    """The stage of that name."""
    for stage in stages:
        if stage.name == name:
            return stage
    raise RunError(f"--stage must be one of {', '.join(stage.name for stage in stages)} (got {name!r})")


def part_of(text: str) -> tuple[int, int]:
    """I and N of `I/N`.

    >>> part_of("2/8")
    (2, 8)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise RunError(f"--part must be I/N with I from 0 to N - 1 (got {text!r})")
    return int(found[1]), int(found[2])


def run_in_its_place(stage: Stage, recipe: Recipe, arguments: Sequence[str]) -> None:
    """A stage here where it needs no model, else in a process of its own; one that is whole is checked and left."""
    if is_finished(stage, synth_folder(recipe)):
        check_finished(stage, recipe, synth_folder(recipe))
        return
    if not stage.uses_model:
        run_one(stage, recipe, 0, 1)
        return
    command = [sys.executable, "-m", "rlpost", "synth", *arguments, "--stage", stage.name]
    status = subprocess.run(command, check=False).returncode
    if status == PREEMPTED:
        raise Preempted(f"the stage {stage.name} was asked to leave: the same command goes on")
    if status:
        raise RunError(f"synth: the stage {stage.name} must end well (it ended with {status}; its message is above)")


def run_one(stage: Stage, recipe: Recipe, part: int, parts: int) -> None:
    """One stage, in this process."""
    folder = synth_folder(recipe)
    if not stage.uses_model:
        count = run_stage(stage, recipe, Bench(recipe, None, folder), part=part, parts=parts)
        _tell(stage, count)
        return
    from rlpost.__main__ import with_world
    from rlpost.world import World

    def run(world: World) -> None:
        if world.size > 1 and stage.kind != "train":
            raise RunError(f"synth: the stage {stage.name} runs on one rank: start it with --part I/N on each GPU")
        with closing(Bench(recipe, world, folder)) as bench:
            count = run_stage(stage, recipe, bench, part=part, parts=parts)
        if world.is_main:
            _tell(stage, count)

    with preemption.listening():
        with_world(run, World())


def _tell(stage: Stage, count: int) -> None:
    print(f"synth: {stage.name}: {count} rows", file=sys.stderr, flush=True)


def show(arguments: Sequence[str]) -> None:
    """`rlpost synth show ID [RUN ...]`: a problem, what became of it, and where it comes from."""
    if not arguments:
        raise RunError("rlpost synth show needs the id of a problem, such as 3f9a12bc-000017")
    id, folders = arguments[0], [Path(name) for name in arguments[1:]] or sorted(Path("runs").glob("*"))
    for folder in folders:
        for name in (PROBLEMS, QUARANTINE):
            for row in _rows(folder / "synth" / name):
                if id in (row.get("key"), row.get("id")):
                    print(f"# {folder / 'synth' / name}\n{json.dumps(row, indent=2, ensure_ascii=False)}")
                    return
    raise RunError(f"no run has a problem {id} (looked in {', '.join(map(str, folders)) or 'runs/'}): name its run")


def _rows(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
