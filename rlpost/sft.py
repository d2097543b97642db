"""Supervised training on worked solutions: the same engine, packing, reducer and checkpoints as in RL.

The result is an ordinary Hugging Face folder, kept under a digest of everything that shaped it, so that a recipe with
an `sft` section makes its base model once.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rlpost.batch import make_batch
from rlpost.checkpoint import Checkpoints
from rlpost.document import Document
from rlpost.engine import Engine
from rlpost.errors import Preempted, RunError
from rlpost.export import export_policy
from rlpost.losses import nll, weighted_sum
from rlpost.metrics import Metrics
from rlpost.model_source import (
    cached_folder,
    context_length,
    is_ready,
    make_folder,
    mark_ready,
    model_folder,
)
from rlpost.packing import make_packer
from rlpost.policy import load_policy
from rlpost.preempt import preemption
from rlpost.progress import Progress
from rlpost.recipe import EngineRecipe, Recipe, Sft
from rlpost.render import Renderer, load_tokenizer
from rlpost.tasks import load_tasks
from rlpost.trackers import Trackers
from rlpost.types import Micro, Task
from rlpost.update import update
from rlpost.world import World

TARGET_STEPS = 20
"""Steps over which the loss is averaged that is compared with `sft.target_loss`."""


def base_model(recipe: Recipe, world: World) -> Path:
    """The folder of the recipe's supervised model: trained now, or found where an equal one was trained before."""
    if recipe.sft is None:
        raise RunError("sft must say what to train on (the recipe has no such section): add sft.tasks.path")
    asked = shaped_by(recipe, recipe.sft)
    folder = cached_folder(Path(recipe.run_dir), "sft", asked)
    if not world.max(int(is_ready(folder))):
        start = model_folder(recipe, world)
        sft(recipe, recipe.sft, start, folder, world)
        if world.is_main:
            mark_ready(folder, asked)
        world.barrier()
    return folder


def sft(recipe: Recipe, section: Sft, start: Path, folder: Path, world: World, *, tasks: Sequence[Task] = ()) -> None:
    """Train the model in `start` on solutions and write the result into `folder`; `tasks`: instead of the section's."""
    tokenizer = load_tokenizer(start, trust_remote_code=recipe.model.trust_remote_code)
    renderer = Renderer(tokenizer, recipe.tasks.prompting, context_length(recipe.model, start))
    demonstrations = Demonstrations(tasks or load_tasks(section.tasks, "sft.tasks"), renderer, recipe.seed)
    engine = Engine(
        load_policy(start, recipe.model),
        engine_recipe(recipe.engine, section),
        dtype=recipe.model.dtype,
        temperature=1.0,
        total_updates=section.steps,
        world=world,
    )
    packer, metrics = make_packer(recipe, world, start), Metrics(world)
    checkpoints = Checkpoints(folder, world, keep=recipe.keep_checkpoints)
    newest = checkpoints.newest()
    first = int(checkpoints.load(newest, engine)["step"]) if newest is not None else 0
    if world.is_main:
        make_folder(folder)
    trackers = Trackers(folder, recipe, world)
    trackers.rewind(first)
    started, losses = time.monotonic(), deque[float](maxlen=TARGET_STEPS)
    with Progress(recipe, world, total_steps=section.steps, start=first) as progress:
        for step in range(first, section.steps):
            documents = demonstrations.batch(step, section.batch_size)[world.rank :: world.size]
            batch = make_batch(documents, packer, world)
            metrics.mean("optim/grad_norm", update(engine, batch, partial(imitation_loss, engine), metrics))
            metrics.last("optim/lr", engine.lr)
            metrics.sum("tokens/trained", batch.step_tokens if world.is_main else 0)
            figures = metrics.reduce()
            trackers.log(step, figures)
            progress.update(step, figures)
            save_or_leave(recipe, engine, checkpoints, step + 1)
            losses.append(figures["policy/loss"])
            if out_of_time(section, started, world) or on_target(section, losses):
                break
    trackers.close()
    export_policy(engine, folder, like=start)
    checkpoints.clear()


def save_or_leave(recipe: Recipe, engine: Engine, checkpoints: Checkpoints, step: int) -> None:
    """After `step` supervised steps, save where that is due, and leave where that was asked or nothing is learned."""
    leaving = preemption.agree(engine.world)
    if leaving or (recipe.save_every and step % recipe.save_every == 0):
        checkpoints.save(step, engine, {})
    if engine.skipped_in_a_row >= recipe.failure.gradients:
        raise RunError(
            f"sft: the gradient must be finite (it was not in {engine.skipped_in_a_row} optimizer steps in a row, the "
            "bound of failure.gradients): lower sft.lr"
        )
    if leaving:
        raise Preempted(f"{preemption.message()}: {step} supervised steps are saved, go on with resume=auto")


def imitation_loss(engine: Engine, micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's share of the mean cross-entropy of the step's completion tokens, and per-token figures."""
    logp_BT, entropy_BT = engine.token_logp(micro)
    loss_BT = nll(logp_BT)
    logged = {"policy/loss": loss_BT, "policy/entropy": entropy_BT}
    return weighted_sum(loss_BT, micro.weight_BT, engine.world.size), logged


class Demonstrations:
    """Solutions as documents, in a fresh order every epoch: batch i is the same whatever came before it."""

    def __init__(self, tasks: Sequence[Task], renderer: Renderer, seed: int) -> None:
        self.seed = seed
        self.documents = [self._document(task, renderer) for task in tasks]
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int, size: int) -> list[Document]:
        """The documents of one optimizer step, over all ranks."""
        return [self.documents[self._place(i)] for i in range(step * size, (step + 1) * size)]

    def _place(self, i: int) -> int:
        epoch, at = divmod(i, len(self.documents))
        if epoch not in self._orders:
            order = list(range(len(self.documents)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._orders = {key: kept for key, kept in self._orders.items() if key == epoch - 1} | {epoch: order}
        return self._orders[epoch][at]

    def _document(self, task: Task, renderer: Renderer) -> Document:
        if task.solution is None:
            raise RunError(f"sft.tasks.solution must name the column to imitate (task {task.key} has no solution)")
        completion = renderer.completion_ids(task.solution)
        document = Document(renderer.prompt_ids(task), completion, (0.0,) * len(completion), 0.0)
        if document.length > renderer.context:
            raise RunError(
                f"sft.tasks: prompt and solution must fit model.context={renderer.context} tokens (task {task.key} has "
                f"{document.length}): raise model.context, or take the task out"
            )
        return document


def engine_recipe(engine: EngineRecipe, section: Sft) -> EngineRecipe:
    """The recipe's engine with the optimizer settings of the supervised part."""
    names = ("lr", "betas", "schedule", "warmup_steps", "decay_frac", "weight_decay")
    return replace(engine, **{name: getattr(section, name) for name in names})


def out_of_time(section: Sft, started: float, world: World) -> bool:
    """Whether `max_seconds` are over, by the clock of the main rank, so that all ranks stop together."""
    if section.max_seconds is None:
        return False
    return bool(world.max(int(world.is_main and time.monotonic() - started >= section.max_seconds)))


def on_target(section: Sft, losses: Sequence[float]) -> bool:
    """Whether the loss of the last steps, which is the same on every rank, is as low as `target_loss`."""
    if section.target_loss is None or len(losses) < TARGET_STEPS:
        return False
    return sum(losses) / TARGET_STEPS <= section.target_loss


def shaped_by(recipe: Recipe, section: Sft) -> dict[str, Any]:
    """Everything that the supervised model depends on, the data file's content included."""
    file = Path(section.tasks.path)
    return {
        "model": asdict(recipe.model),
        "sft": asdict(section),
        "prompting": asdict(recipe.tasks.prompting),
        "engine": {"grad_clip": recipe.engine.grad_clip, "eps": recipe.engine.eps},
        "seed": recipe.seed,
        "data": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
    }
