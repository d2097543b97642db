"""Whether a folder is whole: the size and the checksum of every file in it, in a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rlpost.errors import RunError

if TYPE_CHECKING:
    from rlpost.world import World

T = TypeVar("T")
MANIFEST = "manifest.json"


def describe(folder: Path, world: World, *, to_disk: bool = False) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, which `to_disk` makes sure of; the ranks share the work."""
    names = on_main(world, lambda: _file_names(folder))
    mine = names[world.rank :: world.size]
    parts = together(world, lambda: {name: _describe_file(folder / name, to_disk) for name in mine})
    return {name: entry for part in parts for name, entry in part.items()}


def problem_of(folder: Path, world: World) -> str | None:
    """What is wrong with a folder, the same answer on every rank; None where it is whole."""
    problem = on_main(world, lambda: size_problem(folder))
    if problem is not None:
        return problem
    expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    found = describe(folder, world)
    broken = [name for name in expected if expected[name] != found[name]]
    if broken:
        return f"{', '.join(broken)} differ{'s' * (len(broken) == 1)} from the checksum in {MANIFEST}"
    return None


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and make sure of it, and of the names of all files, on the disk."""
    write_json(folder / MANIFEST, manifest)
    for path in [folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def remove(path: Path) -> None:
    """Remove a folder, or a link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def size_problem(folder: Path) -> str | None:
    """What is wrong with a folder as far as names and sizes tell; None where nothing is."""
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}, so it was not written to its end"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {PurePosixPath(name): int(entry["size"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        if name.is_absolute() or ".." in name.parts:
            return f"its {MANIFEST} names a file outside of it ({name})"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes of {size}"
    return None


def _file_names(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != MANIFEST)


def _describe_file(path: Path, to_disk: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if to_disk:
            os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}


def flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def together(world: World, work: Callable[[], T]) -> list[T]:
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


def on_main(world: World, work: Callable[[], T]) -> T:
    """The main rank's result of `work`, on every rank."""
    return cast(T, together(world, lambda: work() if world.is_main else None)[0])
