"""The run's folder, and checkpoints of everything: a killed run goes on exactly where its newest whole one stands.

<run_dir>/<name>/checkpoints/step-000012/
    engine/, critic/       DeepSpeed's shards, written by all ranks
    reference.safetensors  the reference, where it is no longer the model of the start
    rank-0000.json, .pt    each rank's random generators
    state.json             what the training loop gave: step, curriculum, objective, clock, versions
    manifest.json          size and SHA-256 of every file above: written last, so without it the folder is not whole
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from rlpost.errors import RunError
from rlpost.summary import versions

if TYPE_CHECKING:
    from rlpost.recipe import Recipe
    from rlpost.world import World

T = TypeVar("T")
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-\d{6,}")


class Saves(Protocol):
    """What a checkpoint needs of an engine."""

    def save(self, folder: Path) -> None:
        """Write this rank's shard."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


def open_run(recipe: Recipe, world: World) -> Path:
    """Make the run's folder `run_dir/name`, refuse one that holds another run, and save recipe and versions in it."""
    folder = Path(recipe.run_dir) / str(recipe.name)
    _on_main(world, lambda: _prepare_run(folder, recipe))
    return folder


def _prepare_run(folder: Path, recipe: Recipe) -> None:
    from rlpost.recipe import to_yaml

    continues = recipe.resume == "auto" or (
        recipe.resume != "never" and folder.resolve() in Path(recipe.resume).resolve().parents
    )
    try:
        if not continues and folder.exists() and any(folder.iterdir()):
            raise RunError(
                f"the run folder {folder} must be new or empty (it holds another run): go on with that run with "
                f"resume=auto, choose another name=..., or remove the folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        _write_json(folder / "versions.json", versions())
    except OSError as error:
        raise RunError(
            f"the run folder {folder} must be writable ({error}): choose another run_dir=..., or give yourself access"
        ) from error


class Checkpoints:
    """Saves, finds and loads the checkpoints of one run; every method is called by all ranks together."""

    def __init__(self, run_dir: Path, world: World, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.world = world
        self.keep = keep
        self._verified: Path | None = None

    def save(self, step: int, engine: Saves, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` aside, rename it when it is whole, and drop those beyond `keep`.

        Later steps go as well: they belong to a run that was left when this one went back before them.
        """
        final = self.folder / f"step-{step:06d}"
        tmp = self.folder / f"tmp-{final.name}"
        text = state_to_json({**state, "step": step, "world_size": self.world.size, "versions": versions()})
        try:
            _on_main(self.world, lambda: self._start_over(tmp))
            engine.save(tmp)
            _together(self.world, lambda: _save_random_state(tmp, self.world))
            _on_main(self.world, lambda: (tmp / "state.json").write_text(text, encoding="utf-8"))
            files = self._describe(tmp)
            _on_main(self.world, lambda: self._finish(tmp, final, files))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise RunError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error}): "
                "make room there, or choose another run_dir=... ; the checkpoints before it are untouched"
            ) from error
        return final

    def newest(self) -> Path | None:
        """The newest whole checkpoint, with a warning for each newer one that is not; None where there is none."""
        for folder in _on_main(self.world, self._folders)[::-1]:
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
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["world_size"] != self.world.size:
            raise RunError(
                f"resume: the checkpoint {path} was written by {state['world_size']} ranks and must be loaded by as "
                f"many (got {self.world.size}): start {state['world_size']} processes"
            )
        engine.load(path)
        _load_random_state(path, self.world)
        return dict(state)

    def clear(self) -> None:
        """Remove every checkpoint: what they were for has ended."""
        _on_main(self.world, lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [folder for folder in self.folder.iterdir() if STEP_FOLDER.fullmatch(folder.name)]
        return sorted(found, key=_step)

    def _start_over(self, tmp: Path) -> None:
        for leftover in self.folder.glob("tmp-*"):
            shutil.rmtree(leftover)
        tmp.mkdir(parents=True)

    def _describe(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file; the ranks share the work."""
        names = _on_main(self.world, lambda: _file_names(folder))
        mine = names[self.world.rank :: self.world.size]
        parts = _together(self.world, lambda: {name: _describe_file(folder / name) for name in mine})
        return {name: entry for part in parts for name, entry in part.items()}

    def _finish(self, tmp: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
        _write_json(tmp / MANIFEST, {"files": {name: files[name] for name in sorted(files)}})
        for path in [*tmp.rglob("*"), tmp]:
            _flush(path)
        if final.exists():
            final.rename(self.folder / f"tmp-old-{final.name}")
        tmp.rename(final)
        _flush(self.folder)
        folders = self._folders()
        kept = [folder for folder in folders if _step(folder) <= _step(final)][-self.keep :]
        for old in [*self.folder.glob("tmp-old-*"), *(folder for folder in folders if folder not in kept)]:
            shutil.rmtree(old)

    def _problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same answer on every rank; None where it is whole."""
        problem = _on_main(self.world, lambda: _size_problem(folder))
        if problem is not None:
            return problem
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = self._describe(folder)
        broken = [name for name in expected if expected[name] != found[name]]
        if broken:
            return f"{', '.join(broken)} differ{'s' * (len(broken) == 1)} from the checksum in {MANIFEST}"
        self._verified = folder
        return None


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
        return json.dumps(state, indent=1)
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


def _save_random_state(folder: Path, world: World) -> None:
    import numpy as np
    import torch

    numpy_state = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    generators = {"python": random.getstate(), "numpy": numpy_state}
    (folder / f"rank-{world.rank:04d}.json").write_text(json.dumps(generators), encoding="utf-8")
    tensors = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    torch.save(tensors, folder / f"rank-{world.rank:04d}.pt")


def _load_random_state(folder: Path, world: World) -> None:
    import numpy as np
    import torch

    generators = json.loads((folder / f"rank-{world.rank:04d}.json").read_text(encoding="utf-8"))
    version, internal, gauss = generators["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = generators["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    tensors = torch.load(folder / f"rank-{world.rank:04d}.pt", weights_only=True)
    torch.set_rng_state(tensors["cpu"])
    if world.device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], world.device)


def _size_problem(folder: Path) -> str | None:
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}, so it was not written to its end"
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, entry in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes of {entry['size']}"
    return None


def _file_names(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != MANIFEST)


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _together(world: World, work: Callable[[], T]) -> list[T]:
    """Every rank's result of `work`; where one fails all raise, so that no rank waits for it."""
    result: Any = None
    problem: Exception | None = None
    try:
        result = work()
    except (OSError, RuntimeError, RunError) as error:
        problem = error
    answers = world.all_gather_object((result, problem))
    problems = [problem, *(theirs for _, theirs in answers)]
    for first in filter(None, problems):
        raise first
    return [answer for answer, _ in answers]


def _on_main(world: World, work: Callable[[], T]) -> T:
    """The main rank's result of `work`, on every rank."""
    return cast(T, _together(world, lambda: work() if world.is_main else None)[0])
