"""The run's folder, and checkpoints of everything: a killed run goes on exactly where its newest whole one stands.

<run_dir>/<name>/checkpoints/step-000012/
    engine/, critic/       weights and optimizer as named pieces (`shards.py`), written by all ranks
    reference.safetensors  the reference, where it is no longer the model of the start
    rank-0000.json         each rank's random generators
    state.json             what the training loop gave: step, recipe, curriculum, objective, clock, positions, versions
    manifest.json          size and SHA-256 of every file above: written last, so without it the folder is not whole
<run_dir>/<name>/checkpoints/latest -> step-000012

All of it is JSON and safetensors: nothing that is loaded can run code. A folder has another name until it is whole.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rlpost.errors import RunError
from rlpost.manifest import (
    MANIFEST,
    describe,
    flush,
    on_main,
    problem_of,
    remove,
    seal,
    size_problem,
    together,
    write_json,
)
from rlpost.random_state import random_state, set_random_state
from rlpost.summary import versions

if TYPE_CHECKING:
    from rlpost.recipe import Recipe
    from rlpost.world import World

LATEST = "latest"
STEP_FOLDER = re.compile(r"step-\d{6,}")
LAST_SAVE_S = 600
"""How long a run that fails waits for a save that is under way."""


class Saves(Protocol):
    """What a checkpoint needs of an engine."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copy this rank's state; the result writes it into a folder, without collectives, while training goes on."""

    def load(self, folder: Path) -> None:
        """Read what was written, by whatever number of ranks."""


def open_run(recipe: Recipe, world: World) -> Path:
    """Make the run's folder `run_dir/name`, refuse one that holds another run, and save recipe and versions in it."""
    folder = Path(recipe.run_dir) / str(recipe.name)
    on_main(world, lambda: _prepare_run(folder, recipe))
    return folder


def _prepare_run(folder: Path, recipe: Recipe) -> None:
    from rlpost.changes import check_changes
    from rlpost.recipe import to_yaml

    continues = recipe.resume == "auto" or (
        recipe.resume != "never" and folder.resolve() in Path(recipe.resume).resolve().parents
    )
    try:
        there = [path for path in folder.iterdir() if path.name not in ("synth", "servers")] if folder.exists() else []
        if not continues and there:
            raise RunError(
                f"the run folder {folder} must be new or empty (it holds another run): go on with that run with "
                f"resume=auto, choose another name=..., or remove the folder"
            )
        if (saved := _saved_recipe(recipe, folder)) is not None and (said := check_changes(saved, recipe)):
            warnings.warn(said, stacklevel=2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        write_json(folder / "versions.json", versions())
    except OSError as error:
        raise RunError(
            f"the run folder {folder} must be writable ({error}): choose another run_dir=..., or give yourself access"
        ) from error


def _saved_recipe(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The recipe of the checkpoint that this one goes on from, as far as that can be told from sizes alone."""
    if recipe.resume == "never":
        return None
    folders = _folders(folder / "checkpoints")[::-1] if recipe.resume == "auto" else [Path(recipe.resume)]
    for found in folders:
        if size_problem(found) is None:
            with suppress(ValueError):  # damaged: checksums will tell, and the one before is used
                return cast("dict[str, Any] | None", read_state(found).get("recipe"))
    return None


@dataclass(frozen=True)
class Copied:
    """The state of a run at a step, copied: it can be written while training goes on."""

    step: int
    write: Callable[[Path], None]
    random: str
    state: str
    score: float | None


class Checkpoints:
    """Saves, finds and loads the checkpoints of one run; every method is called by all ranks together.

    `keep` of the newest stay, and those of every `keep_every` steps, and the one with the highest score.
    `background`: the ranks with collectives of their own; without it a save is over when `save` returns.
    """

    def __init__(
        self, run_dir: Path, world: World, keep: int, *, keep_every: int = 0, background: World | None = None
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.world = world
        self.keep, self.keep_every = keep, keep_every
        self._background = background
        self._thread: threading.Thread | None = None
        self._problem_of_thread: Exception | None = None
        self._verified: Path | None = None
        self._saved: int | None = None

    def save(
        self, step: int, engine: Saves, state: Mapping[str, Any], *, score: float | None = None, wait: bool = True
    ) -> Path:
        """Write the checkpoint of `step` aside, rename it when it is whole, and drop what is not to be kept.

        Later steps go as well: they belong to a run that was left when this one went back before them. Without `wait`
        it returns once the state is copied, or where the save before is not written yet, once that is.
        """
        final = self.folder / f"step-{step:06d}"
        try:
            self.wait()
        except RunError as error:  # there may be room again; if not, the run stops now
            wait, self._saved = True, None
            if self.world.is_main:
                warnings.warn(f"{error}; now step {step} is saved", stacklevel=2)
        if self._saved == step:
            return final
        whole = {**state, "step": step, "world_size": self.world.size, "versions": versions()}
        text = state_to_json(whole)
        copied = Copied(step, engine.snapshot(), random_state(self.world.device), text, score)
        if wait or self._background is None:
            self._write(self.world, copied)
        else:
            self._thread = threading.Thread(target=self._write_aside, args=(self._background, copied), daemon=True)
            self._thread.start()
        self._saved = step
        return final

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong with it, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem_of_thread = self._problem_of_thread, None
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Give a save that is under way the time to end."""
        if self._thread is not None:
            self._thread.join(LAST_SAVE_S)

    def _write_aside(self, world: World, copied: Copied) -> None:
        try:
            self._write(world, copied)
        except Exception as error:  # whatever it is, the thread has nobody to tell: `wait` raises it
            self._problem_of_thread = error

    def _write(self, world: World, copied: Copied) -> None:
        final = self.folder / f"step-{copied.step:06d}"
        tmp = self.folder / f"tmp-{final.name}"

        def own() -> None:
            copied.write(tmp)
            (tmp / f"rank-{world.rank:04d}.json").write_text(copied.random, encoding="utf-8")
            if world.is_main:
                (tmp / "state.json").write_text(copied.state, encoding="utf-8")

        try:
            on_main(world, lambda: self._start_over(tmp))
            together(world, own)
            files = describe(tmp, world, to_disk=True)
            on_main(world, lambda: self._finish(tmp, final, {"score": copied.score, "files": files}))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if world.is_main:
                shutil.rmtree(tmp, ignore_errors=True)  # it takes room that may be what is missing
            raise RunError(
                f"the checkpoint of step {copied.step} could not be written to {self.folder} ({error}): "
                "make room there, or choose another run_dir=... ; the checkpoints before it are untouched"
            ) from error

    def newest(self) -> Path | None:
        """The newest whole checkpoint, with a warning for each newer one that is not; None where there is none."""
        for folder in on_main(self.world, lambda: _folders(self.folder))[::-1]:
            problem = self._problem(folder)
            if problem is None:
                return folder
            if self.world.is_main:
                warnings.warn(f"checkpoint {folder} is skipped, and the one before it used: {problem}", stacklevel=2)
        return None

    def load(self, path: Path, engine: Saves) -> dict[str, Any]:
        """Restore engine and random generators from `path`, and return the state that `save` was given."""
        problem = None if path == self._verified else self._problem(path)
        if problem is not None:
            raise RunError(f"resume: the checkpoint {path} must be whole ({problem}): choose another, or resume=auto")
        state = read_state(path)
        engine.load(path)
        own = path / f"rank-{self.world.rank:04d}.json"
        if own.is_file():  # a rank that was not there before goes on with the numbers of its seed
            set_random_state(own.read_text(encoding="utf-8"), self.world.device)
        if self.world.is_main and (said := _other_versions(state["versions"], versions())):
            warnings.warn(f"resume: {path} was written with {said}: figures may differ from here on", stacklevel=2)
        return state

    def clear(self) -> None:
        """Remove every checkpoint: what they were for has ended."""
        self.wait()
        on_main(self.world, lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _start_over(self, tmp: Path) -> None:
        for leftover in self.folder.glob("tmp-*"):
            remove(leftover)
        tmp.mkdir(parents=True)

    def _finish(self, tmp: Path, final: Path, manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: manifest["files"][name] for name in sorted(manifest["files"])}
        seal(tmp, manifest)
        if final.exists():
            final.rename(self.folder / f"tmp-replaced-{final.name}")
        tmp.rename(final)
        flush(self.folder)
        _point(self.folder / LATEST, final.name)
        folders = {_step(folder): folder for folder in _folders(self.folder)}
        scores = {step: _score(folder) for step, folder in folders.items() if step <= _step(final)}
        keep = kept(scores, last=self.keep, every=self.keep_every)
        for left in [*self.folder.glob("tmp-*"), *(folder for step, folder in folders.items() if step not in keep)]:
            remove(left)

    def _problem(self, folder: Path) -> str | None:
        problem = problem_of(folder, self.world)
        self._verified = folder if problem is None else self._verified
        return problem


def kept(scores: Mapping[int, float | None], *, last: int, every: int) -> set[int]:
    """Steps whose checkpoints stay: the `last` ones, multiples of `every`, and the one with the highest score.

    >>> sorted(kept({10: 0.5, 20: 0.7, 30: None, 40: 0.6, 50: None}, last=1, every=30))
    [20, 30, 50]
    """
    known = [(score, step) for step, score in scores.items() if score is not None]
    best = {max(known)[1]} if known else set()
    return {*sorted(scores)[-last:], *(step for step in scores if every and step % every == 0), *best}


def read_state(folder: Path) -> dict[str, Any]:
    """What the training loop gave to a checkpoint, and its step, number of ranks and versions."""
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def _other_versions(saved: Mapping[str, str], own: Mapping[str, str]) -> str:
    other = [name for name in saved if saved[name] != own.get(name)]
    return ", ".join(f"{name} {saved[name]} (now {own.get(name, 'none')})" for name in other)


def _folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their names, the newest last."""
    if not folder.is_dir():
        return []
    return sorted((found for found in folder.iterdir() if STEP_FOLDER.fullmatch(found.name)), key=_step)


def _score(folder: Path) -> float | None:
    try:
        return cast("float | None", json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("score"))
    except (OSError, ValueError):  # not whole: it counts as one without a score
        return None


def _point(link: Path, name: str) -> None:
    """Make a link lead to a folder, at no moment to none."""
    fresh = link.with_name(f"tmp-{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(link)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def state_to_json(state: Mapping[str, Any]) -> str:
    """The state as JSON; refuses keys that would come back as text and so change what resumes."""
    wrong = _odd_key(state, "state")
    if wrong:
        raise RunError(
            f"a state_dict must be plain JSON with text keys, or it would not resume exactly (found {wrong})"
        )
    try:
        return json.dumps(state)
    except TypeError as error:
        raise RunError(f"a state_dict must be plain JSON: numbers, text, lists, dicts ({error})") from error


def _odd_key(value: Any, where: str) -> str | None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"key {key!r} in {where}"
            if found := _odd_key(item, f"{where}.{key}"):
                return found
    elif isinstance(value, (list, tuple)):
        return next(filter(None, (_odd_key(item, where) for item in value)), None)
    return None
