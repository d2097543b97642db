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
from rlpost.recipe import Recipe
from rlpost.render import Renderer
from rlpost.reward_recipe import bind_rewards
from rlpost.run import make_engines, make_generator, make_renderer, training_sampling
from rlpost.score import Rewards, score
from rlpost.sft import base_model
from rlpost.tasks import load_task_sets
from rlpost.types import Micro, Sampling, Task
from rlpost.world import World

CHUNK = 256
"""Tasks between two writes."""
PASSES = 3
"""How many passes PassUntil waits for."""
SEED_OFFSET = 1 << 21
"""Keeps the seeds of difficulty apart from those of training and evaluation."""


@dataclass(frozen=True)
class Ask:
    """What is asked about each task."""

    n: int = 16
    """Answers a task; 0 with a probe: none."""
    until: int | None = None
    """PassUntil: a task with fewer than `PASSES` passes is tried on, up to so many times."""
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
        """Sample `n` answers a task, and on where passes are rare; each round doubles what was drawn."""
        passed: dict[int, list[bool | None]] = {place: [] for place, _ in mine}
        lengths: dict[int, list[int]] = {place: [] for place, _ in mine}
        truncated = dict.fromkeys(passed, 0)
        pending, drawn, turn = list(mine), 0, 0
        while pending:
            size = self.ask.n if not turn else min(drawn, (self.ask.until or 0) - drawn)
            groups = collect(
                self.generator,
                self.renderer,
                pending,
                self.sampling,
                group_size=size,
                first_group=0,
                seed=self.recipe.seed + SEED_OFFSET + turn,
                interruption=self.recipe.algorithm.interruption,
            )
            score(groups, self.rewards)
            for group in groups:
                passed[group.id] += [rollout.passed for rollout in group.rollouts]
                lengths[group.id] += [len(rollout.token_ids) for rollout in group.rollouts]
                truncated[group.id] += sum(rollout.truncated for rollout in group.rollouts)
            drawn, turn = drawn + size, turn + 1
            rare = drawn < (self.ask.until or 0)
            pending = [pair for pair in pending if rare and passed[pair[0]].count(True) < PASSES]
        return [
            estimate(passed[place], self.ask.n)
            | {"length_mean": sum(lengths[place]) / len(lengths[place])}
            | {"truncated_frac": truncated[place] / len(lengths[place])}
            for place, _ in mine
        ]

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
        greedy = replace(self.sampling, temperature=0.0, max_new_tokens=1)
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


def estimate(passed: Sequence[bool | None], n: int) -> dict[str, Any]:
    """Pass rate, Wilson's 95 % interval and difficulty of a task that was tried n times, and on until `PASSES` passes.

    Of the first n answers k pass: k / n where k >= r or nothing more was drawn, r = PASSES. Else K is the draw of the
    r-th pass, and p = (r - 1) / (K - 1), where r / K, PassUntil's estimate (arXiv:2310.03262), is too high; and k / N
    where all N draws had k < r. Together this is unbiased for every p. Answers that could not be judged count nowhere.

    >>> estimate([False, True, False, False], n=4)["pass_rate"]
    0.25
    >>> estimate([False] * 4 + [True, False, True, True, False], n=4)["pass_rate"]   # (3 - 1) / (8 - 1)
    0.2857142857142857
    """
    first = [flag for flag in passed[:n] if flag is not None]
    flags = [flag for flag in passed if flag is not None]
    whole = [i + 1 for i, flag in enumerate(flags) if flag]
    if len(passed) <= n or sum(first) >= PASSES:
        passes, tries = sum(first), len(first)
        rate = passes / tries if tries else None
    elif len(whole) >= PASSES:
        passes, tries = PASSES, whole[PASSES - 1]
        rate = (passes - 1) / (tries - 1)
    else:
        passes, tries = len(whole), len(flags)
        rate = passes / tries if tries else None
    low, high = wilson(passes, tries)
    said = {"passes": passes, "tries": tries, "unjudged": len(passed) - len(flags), "pass_rate": rate}
    return said | {"low": low, "high": high, "difficulty": None if rate is None else 1 - rate}


def wilson(passes: int, tries: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, 95 %; it has a width also at 0 and 1.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    >>> [round(x, 4) for x in wilson(0, 10)], [round(x, 4) for x in wilson(5, 10)]
    ([0.0, 0.2775], [0.2366, 0.7634])
    """
    if not tries:
        return 0.0, 1.0
    p, part = passes / tries, z * z / tries
    half = z * math.sqrt(p * (1 - p) / tries + part / 4 / tries)
    return max(0.0, (p + part / 2 - half) / (1 + part)), min(1.0, (p + part / 2 + half) / (1 + part))


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
