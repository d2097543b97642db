"""A run's folder as a reader finds it, while the run goes on or later: figures, recipe, summary, rollouts, choices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError


@dataclass(frozen=True, slots=True)
class History:
    """What a run has left behind so far."""

    folder: Path
    rows: list[dict[str, Any]]
    """The lines of `metrics.jsonl` in their order."""
    recipe: dict[str, Any]
    summary: dict[str, Any] | None
    """None while the run has not finished."""

    @property
    def name(self) -> str:
        """The run's own name, or its folder's."""
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [row for row in self.rows if not is_evaluation(row)]

    @property
    def evaluations(self) -> list[tuple[int, dict[str, Any]]]:
        """(steps done, figures) of each evaluation; one in front of every step has 0."""
        found, any_step = [], False
        for row in self.rows:
            if is_evaluation(row):
                found.append((row["step"] + 1 if any_step else 0, row))
            else:
                any_step = True
        return found

    @property
    def total_steps(self) -> int:
        """The steps that the recipe asks for."""
        return int(self.recipe.get("steps") or (self.summary or {}).get("steps") or len(self.steps))


def is_evaluation(row: dict[str, Any]) -> bool:
    """Whether a line of figures is one of an evaluation."""
    return "eval/pass@1" in row


def read_history(folder: Path) -> History:
    """What there is in a run's folder; a RunError where it is none."""
    if not folder.is_dir():
        raise RunError(f"{folder} must be the folder of a run (there is no such folder)")
    if not any((folder / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "summary.json")):
        raise RunError(
            f"{folder} must be the folder of a run, such as runs/quickstart (it has no recipe and no figures)"
        )
    summary = _json(folder / "summary.json")
    recipe = _yaml(folder / "recipe.yaml") or (summary or {}).get("recipe") or {}
    return History(folder, list(lines_of(folder / "metrics.jsonl")), recipe, summary)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, without a last line that is still being written."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RunError(f"{path} must have a JSON object in each line (line {number}: {error.msg})") from error
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise RunError(f"{path} must have a JSON object with a `step` in each line (line {number} has none)")
            yield row


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path} must be JSON ({error.msg} in line {error.lineno}): was the run's disk full?") from error
    return found if isinstance(found, dict) else None


def _yaml(path: Path) -> dict[str, Any] | None:
    import yaml

    if not path.exists():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as error:
        raise RunError(f"{path} must be YAML ({str(error).splitlines()[0]})") from error
    return found if isinstance(found, dict) else None
