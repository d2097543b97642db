"""`rlpost difficulty`: how difficult the training tasks are for a model, as a file that curricula read.

One line a task and model: `key`, `difficulty` (1 - pass rate), and what it was made of. The file grows by chunks of
tasks; the same command goes on where it was cut off.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpost.batch import with_scores
from rlpost.collect import collect
from rlpost.document import Document
from rlpost.engine import Engine
from rlpost.errors import RunError, SharedError
from rlpost.generate.base import Generator
from rlpost.model_source import model_folder
from rlpost.packing import Packer, make_packer
from rlpost.passuntil import estimate, until_passes
from rlpost.recipe import Recipe
from rlpost.render import Renderer
from rlpost.reward_recipe import bind_rewards
from rlpost.run import make_engines, make_generator, make_renderer, training_sampling
from rlpost.score import Rewards, score
from rlpost.sft import base_model
from rlpost.task_filters import of_length
from rlpost.tasks import load_task_sets
from rlpost.types import Group, Micro, Sampling, Task
from rlpost.world import World

CHUNK = 256
"""Tasks between two writes."""
SEED_OFFSET = 1 << 21
"""Keeps the seeds of difficulty apart from those of training and evaluation."""


@dataclass(frozen=True)
class Ask:
    """What is asked about each task."""

    n: int = 16
    """Answers a task; 0 with a probe: none."""
    until: int | None = None
    """PassUntil: a task with fewer than three passes is tried on, up to so many times."""
    probe: str | None = None
    """A token: how probable it is as the first one of the answer."""

    def __post_init__(self) -> None:
        if self.n < (0 if self.probe else 1):
            raise RunError(f"--n must be >= 1, or 0 with --probe (got {self.n})")
        if self.until is not None and self.until < max(1, self.n):
            raise RunError(f"--passuntil must be at least --n (got {self.until} and {self.n})")

    def describe(self, recipe: Recipe) -> str:
        """The question in a line, by which a file is known to hold answers to it."""
        sampling = recipe.sampling
        return (
            f"n={self.n} passuntil={self.until} probe={self.probe} seed={recipe.seed} "
            f"temperature={sampling.temperature:g} max_new_tokens={sampling.max_new_tokens}"
        )


@dataclass(frozen=True)
class Prober:
    """Everything that answers questions about tasks, for one model."""

    recipe: Recipe
    world: World
    ask: Ask
    renderer: Renderer
    sampling: Sampling
    rewards: Rewards
    packer: Packer
    engine: Engine
    generator: Generator

    def rows(self, places: Sequence[tuple[int, Task]]) -> list[dict[str, Any]]:
        """A row of each (place, task), of all ranks together; where one fails, every rank raises its error."""
        start, stop = (len(places) * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        mine = places[start:stop]
        rows: list[dict[str, Any]] = [{"key": task.key, "source": task.source} for _, task in mine]
        error = None
        if self.ask.probe is not None:
            _put(rows, self._probabilities(mine))
        with self.generator.awake(self.engine, self.engine.updates):
            try:
                if self.ask.probe is not None:
                    _put(rows, self._first_tokens(mine))
                if self.ask.n:
                    _put(rows, self._pass_rates(mine))
            except RunError as failed:
                error = failed
        every_rank = self.world.all_gather_object((None if error is None else str(error), rows))
        for message, _ in every_rank:
            if message is not None:
                raise SharedError(message) from error
        return [row for _, one_rank in every_rank for row in one_rank]

    def _pass_rates(self, mine: Sequence[tuple[int, Task]]) -> list[dict[str, Any]]:
        """Sample `n` answers a task, and on where passes are rare."""
        found = until_passes(self._answers, mine, n=self.ask.n, until=self.ask.until)
        return [
            estimate([rollout.passed for rollout in rollouts], self.ask.n)
            | {"length_mean": sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts)}
            | {"truncated_frac": sum(rollout.truncated for rollout in rollouts) / len(rollouts)}
            for rollouts in found
        ]

    def _answers(self, places: Sequence[tuple[int, Task]], size: int, turn: int) -> list[Group]:
        groups = collect(
            self.generator,
            self.renderer,
            places,
            self.sampling,
            group_size=size,
            first_group=0,
            seed=self.recipe.seed + SEED_OFFSET + turn,
            interruption=self.recipe.algorithm.interruption,
        )
        score(groups, self.rewards)
        return groups

    def _probabilities(self, mine: Sequence[tuple[int, Task]]) -> list[dict[str, Any]]:
        """Probability of the probe as the first token, by the trainer, at temperature 1."""
        token = probe_token(self.renderer, str(self.ask.probe))
        documents = [Document(self.renderer.prompt_ids(task), (token,), (0.0,), group=place) for place, task in mine]

        def scores(micro: Micro) -> dict[str, Any]:
            return {"probe": self.engine.token_logp(micro, temperature=1.0)[0]}

        found = with_scores(documents, self.packer, self.world, scores)
        probabilities = [math.exp(float(one.scores["probe"][0])) for one in found]
        return [{"probe_prob": p} | ({} if self.ask.n else {"difficulty": 1 - p}) for p in probabilities]

    def _first_tokens(self, mine: Sequence[tuple[int, Task]]) -> list[dict[str, Any]]:
        """Whether the probe is the most probable first token: ScaleDiff's test, where such a task is easy."""
        token = probe_token(self.renderer, str(self.ask.probe))
        greedy = replace(self.sampling, temperature=0.0, max_new_tokens=1, rollout=None)
        groups = collect(self.generator, self.renderer, mine, greedy, group_size=1, first_group=0, seed=0)
        return [{"probe_first": group.rollouts[0].token_ids[:1] == (token,)} for group in groups]


def measure(recipe: Recipe, world: World, ask: Ask, *, out: Path, model: str | None = None) -> Path:
    """Write a line for each training task that `out` does not have yet, by the recipe's own model or another."""
    if model is None:
        _measure_model(recipe, world, ask, out, None)
    else:
        other = replace(recipe, model=replace(recipe.model, path=model, init=None), sft=None)
        _measure_model(other, world, ask, out, model)
    return out


def measure_each(models: Sequence[str], command: Sequence[str], world_size: int) -> int:
    """The same command for one model after the other, each in its own process; the first exit status that is not 0.

    In one process vLLM's end would take the ranks' process group with it.
    """
    if world_size > 1:
        raise RunError("--models takes several models on one rank only: give each its own command, with the same --out")
    for model in models:
        status = subprocess.run([sys.executable, "-m", "rlpost", *command, "--models", model], check=False).returncode
        if status:
            return status
    return 0


def _measure_model(recipe: Recipe, world: World, ask: Ask, out: Path, name: str | None) -> None:
    tasks, _ = load_task_sets(recipe)
    folder = base_model(recipe, world) if recipe.sft else model_folder(recipe, world)
    renderer = make_renderer(recipe, folder)
    tasks = of_length(tasks, recipe.tasks.sources, renderer)
    sampling = training_sampling(recipe, tasks, renderer)
    if ask.probe is not None:
        probe_token(renderer, ask.probe)
    head = {"model": name or str(folder), "asked": ask.describe(recipe)}
    done = _on_every_rank(world, out, head)
    left = [(place, task) for place, task in enumerate(tasks) if task.key not in done]
    if not left:
        return
    engine, *_ = make_engines(recipe, folder, world)
    made = make_generator(recipe, folder, renderer, tasks[0], engine)
    with closing(made) as generator, closing(bind_rewards(recipe.rewards, recipe.failure)) as rewards:
        packer = make_packer(recipe, world, folder)
        prober = Prober(recipe, world, ask, renderer, sampling, rewards, packer, engine, generator)
        for chunk in _chunks(left, world.size):
            rows = prober.rows(chunk)
            if world.is_main:
                append(out, [head | row for row in rows])
                done |= {row["key"] for row in rows}
                print(f"difficulty: {len(done)} of {len(tasks)} tasks", file=sys.stderr, flush=True)


def probe_token(renderer: Renderer, text: str) -> int:
    """The id of a text that is one token."""
    ids = renderer.text_ids(text)
    if len(ids) != 1:
        raise RunError(f"--probe must be one token of the model, such as </think> (got {text!r}, which is {len(ids)})")
    return ids[0]


def recorded(out: Path, head: dict[str, str]) -> set[str]:
    """Keys that the file has of this model; a last line that was cut off is dropped.

    Answers of this model to another question are an error.
    """
    if not out.exists():
        return set()
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        shorter = out.with_name(out.name + ".tmp")
        shorter.write_text("".join(lines[:-1]), encoding="utf-8")
        shorter.replace(out)
        lines = lines[:-1]
    try:
        rows = [row for row in map(json.loads, lines) if row["model"] == head["model"]]
        others = {row["asked"] for row in rows} - {head["asked"]}
        keys = {row["key"] for row in rows}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise RunError(f"--out must be a file of `rlpost difficulty`, or new ({out} has other lines)") from None
    if others:
        raise RunError(
            f"--out: {out} has answers of {head['model']} to another question ({others.pop()}; asked is "
            f"{head['asked']}): choose another file"
        )
    return keys


def append(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add lines, and see that they are on the disk."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"--out: {out} must be writable ({error})") from error


def _on_every_rank(world: World, out: Path, head: dict[str, str]) -> set[str]:
    """What the main rank found in the file, or its error, on every rank."""
    found: tuple[str | None, set[str]] = (None, set())
    if world.is_main:
        try:
            found = (None, recorded(out, head))
        except RunError as error:
            found = (str(error), set())
    message, keys = world.all_gather_object(found)[0]
    if message is not None:
        raise SharedError(message)
    return set(keys)


def _chunks(pairs: Sequence[tuple[int, Task]], ranks: int) -> Iterator[Sequence[tuple[int, Task]]]:
    size = max(ranks, CHUNK)
    yield from (pairs[start : start + size] for start in range(0, len(pairs), size))


def _put(rows: Sequence[dict[str, Any]], more: Sequence[dict[str, Any]]) -> None:
    for row, extra in zip(rows, more, strict=True):
        row.update(extra)
