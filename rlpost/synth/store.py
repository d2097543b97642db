"""A stage's file: one line a row, added as it is made, each exactly once however often the command is killed.

A stage may be split into parts, which run side by side as processes of their own; each has a file. `head.json` says
what the rows were made from: settings, and the head of the stage before. `.done` beside a part says that it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.synth.rows import Row

ROWS, SECONDS = 512, 2.0
"""Rows are written out and synced when there are so many, or so long after the last time."""


def digest(of: Any) -> str:
    """Twelve characters that tell one plain value from another."""
    return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Part:
    """One of `parts` files of a stage."""

    def __init__(self, folder: Path, *, part: int = 0, parts: int = 1) -> None:
        self.folder, self.part, self.parts = folder, part, parts
        self.file = folder / f"part-{part}-of-{parts}.jsonl"
        self.mark = self.file.with_suffix(".done")

    def open(self, head: Mapping[str, Any]) -> set[str]:
        """Make the folder or compare its head; cut a last line that was torn; the ids that are there."""
        head = dict(head) | {"parts": self.parts}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _same_head(self.folder, head)
            data = self.file.read_bytes() if self.file.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.file, whole)
        except OSError as error:
            raise RunError(f"run_dir: {self.folder} must be a folder that can be written ({error})") from error
        return {json.loads(line)["id"] for line in data[:whole].splitlines()}

    def write(self, rows: Iterable[Row]) -> int:
        """Add rows as they come; how many."""
        count, waiting, last = 0, list[str](), time.monotonic()
        with self.file.open("a", encoding="utf-8") as file:
            try:
                for row in rows:
                    waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
                    if len(waiting) >= ROWS or time.monotonic() - last >= SECONDS:
                        _sync(file, waiting)
                        waiting, last = [], time.monotonic()
            finally:
                _sync(file, waiting)  # also what was made before an error or a leave
        return count

    def finish(self, rows: int, seconds: float) -> None:
        """Say that every row is there; so many were made last, in so many seconds with the start of models."""
        whole = self.mark.with_suffix(".tmp")
        whole.write_text(json.dumps({"rows": rows, "seconds": round(seconds, 3)}) + "\n")
        whole.replace(self.mark)

    @property
    def is_done(self) -> bool:
        """Whether every row is there."""
        return self.mark.exists()


def _sync(file: Any, lines: list[str]) -> None:
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())


def check_head(folder: Path, head: Mapping[str, Any]) -> None:
    """Raise where a stage that is there was made from something else."""
    _same_head(folder, dict(head) | {"parts": head_of(folder).get("parts")})


def _same_head(folder: Path, head: Mapping[str, Any]) -> None:
    path = folder / "head.json"
    asked = json.loads(json.dumps(head, default=str))
    if not path.exists():
        whole = path.with_name(f"head.{os.getpid()}.tmp")  # two parts may begin at once
        whole.write_text(json.dumps(asked, indent=2, sort_keys=True) + "\n")
        whole.replace(path)
        return
    found = json.loads(path.read_text())
    different = sorted(key for key in {*found, *asked} if found.get(key) != asked.get(key))
    if different:
        key = different[0]
        raise RunError(
            f"synth: {folder} was made with other settings ({', '.join(different)}; {key} was {found.get(key)!r} and "
            f"is {asked.get(key)!r}): give the run another name, or remove this folder and those of later stages"
        )


def head_of(folder: Path) -> dict[str, Any]:
    """What a stage's rows were made from; empty where there are none."""
    path = folder / "head.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def is_done(folder: Path) -> bool:
    """Whether every part of a stage is there and whole."""
    parts = int(head_of(folder).get("parts", 0))
    return parts > 0 and all(Part(folder, part=i, parts=parts).is_done for i in range(parts))


def read(folder: Path) -> Iterator[Row]:
    """The rows of every part of a whole stage, one after the other."""
    if not is_done(folder):
        raise RunError(f"synth: the stage {folder.name} must be whole before what follows ({folder} is not): run it")
    parts = int(head_of(folder)["parts"])
    for i in range(parts):
        with Part(folder, part=i, parts=parts).file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def seed_of(seed: int, id: str) -> int:
    """A seed below 2^30 that belongs to this run and row, whatever comes before it."""
    return int(digest(f"{seed}:{id}"), 16) & ((1 << 30) - 1)
