"""The problem generator: a language model of problems alone, by the supervised loop. DiffGen, arXiv:2509.21070."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError
from rlpost.model_recipe import Lora
from rlpost.recipe import Prompting, Recipe, Sft, TaskSource
from rlpost.synth.bench import Bench
from rlpost.synth.rows import Row
from rlpost.synth.store import digest
from rlpost.types import Task

if TYPE_CHECKING:
    from rlpost.render import Renderer

uses_model = True


def generator(
    rows: Sequence[Row],
    bench: Bench,
    *,
    model: str = "policy",
    prompt: str = "<|im_start|>user\n",
    end: str = "<|im_end|>",
    epochs: float = 1.0,
    batch_size: int = 128,
    lr: float = 5e-5,
    warmup_frac: float = 0.1,
    weight_decay: float = 1e-4,
    betas: list[float] | None = None,
    lora_rank: int | None = None,
) -> dict[str, Any]:
    """Train `model` to write the problems of `rows` after `prompt`, each up to `end`; the settings are ScaleDiff's.

    A loss on the problem's text and `end` alone. `end` is one token, or empty for the tokenizer's own end token;
    `lora_rank`: train adapters of that rank instead of all weights, and merge them. What is returned says where the
    model is.
    """
    start_recipe, start = bench.folder_of(model)
    tasks = [Task(str(row["id"]), prompt, solution=f"{row['prompt']}{end}") for row in rows]
    steps = max(1, math.ceil(epochs * len(tasks) / batch_size))
    section = Sft(
        tasks=TaskSource(path="", solution="solution"),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        betas=betas or [0.9, 0.999],
        warmup_steps=round(warmup_frac * steps),
        decay_frac=1 - warmup_frac,
        weight_decay=weight_decay,
    )
    folder = _trained(_recipe(start_recipe, lora_rank), section, start, tasks, bench)
    return {"model": str(folder), "prompt": prompt, "end": end, "problems": len(tasks), "steps": steps}


def _trained(recipe: Recipe, section: Sft, start: Path, tasks: Sequence[Task], bench: Bench) -> Path:
    """The folder of the generator: trained now, or found where an equal one was trained before."""
    from rlpost.model_source import cached_folder, is_ready, mark_ready
    from rlpost.sft import sft

    asked: dict[str, Any] = {
        "start": str(start),
        "sft": asdict(section),
        "model": asdict(recipe.model),
        "problems": digest([[task.prompt, task.solution] for task in tasks]),
        "seed": recipe.seed,
    }
    folder, world = cached_folder(Path(recipe.run_dir), "problems", asked), bench.world
    assert world is not None, "a stage that uses a model has one"
    if not world.max(int(is_ready(folder))):
        sft(recipe, section, start, folder, world, tasks=tasks)
        if world.is_main:
            mark_ready(folder, asked)
        world.barrier()
    return folder


def _recipe(recipe: Recipe, lora_rank: int | None) -> Recipe:
    """The start model's recipe with prompts as plain text, and the adapters that were asked for."""
    lora = None if lora_rank is None else Lora(rank=lora_rank)
    plain = replace(recipe.tasks, prompting=Prompting(chat=False))
    return replace(recipe, tasks=plain, model=replace(recipe.model, lora=lora))


def generator_of(bench: Bench) -> dict[str, Any]:
    """What the stage `train` has said of its model."""
    found = generator_of_folder(bench.folder)
    if found is None:
        raise RunError(f"synth: the stage train must be whole before problems are sampled ({bench.folder} has none)")
    return found


def generator_of_folder(folder: Path) -> dict[str, Any] | None:
    """The same of a run's synthesis; None where it has no generator yet."""
    path = folder / "train" / "generator.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def stop_ids(renderer: Renderer, end: str) -> tuple[int, ...]:
    """Tokens at which a problem is whole."""
    if not end:
        return renderer.stop_ids
    ids = renderer.text_ids(end)
    if len(ids) != 1:
        raise RunError(
            f"synth.train.end must be one token of the generator (got {end!r}, which is {len(ids)}): name another, or "
            "leave it empty for the tokenizer's end token"
        )
    return (*renderer.stop_ids, ids[0])
