"""Which tasks of a source are used: by column, by difficulty, by the length of the prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError
from rlpost.task_recipe import Keep, TaskSource
from rlpost.types import Task

if TYPE_CHECKING:
    from rlpost.render import Renderer

log = logging.getLogger(__name__)


def kept(tasks: Sequence[Task], keep: Keep, where: str) -> list[Task]:
    """The tasks that `keep` asks for, as far as that can be said without a tokenizer."""
    left = [task for task in tasks if all(_has(task, column, asked) for column, asked in keep.where.items())]
    left = _said(tasks, left, f"{where}.keep.where", f"{dict(keep.where)}")
    if keep.difficulty is None:
        return left
    from curricula._files import difficulty_of

    low = -float("inf") if keep.min_difficulty is None else keep.min_difficulty
    high = float("inf") if keep.max_difficulty is None else keep.max_difficulty
    values = difficulty_of(left, keep.difficulty, where=f"{where}.keep.difficulty")
    inside = [task for task, value in zip(left, values, strict=True) if low <= value <= high]  # NaN is in no range
    return _said(left, inside, f"{where}.keep.difficulty", f"{low:g} to {high:g}")


def of_length(tasks: Sequence[Task], sources: Mapping[str, TaskSource], renderer: Renderer) -> list[Task]:
    """The tasks whose prompts have as many tokens as their source asks for."""
    asked = {label(source): (where, source.keep) for where, source in sources.items()}
    found: list[Task] = []
    for name, (where, keep) in asked.items():
        mine = [task for task in tasks if task.source == name]
        if keep.min_tokens is not None or keep.max_tokens is not None:
            low, high = keep.min_tokens or 0, keep.max_tokens or renderer.context
            inside = [task for task in mine if low <= len(renderer.prompt_ids(task)) <= high]
            mine = _said(mine, inside, f"{where}.keep", f"{low} to {high} tokens")
        found += mine
    return found


def label(source: TaskSource) -> str:
    """What a source is called."""
    return source.name or source.path


def _has(task: Task, column: str, asked: Any) -> bool:
    value = task.extra.get(column)
    return value in asked if isinstance(asked, list) else value == asked


def _said(before: Sequence[Task], after: list[Task], where: str, asked: str) -> list[Task]:
    """What was kept; nothing at all is an error."""
    if before and not after:
        raise RunError(f"{where} must leave at least one task (none of {len(before)} has {asked}): ask for less")
    if len(after) < len(before):
        log.warning("%s: kept %d of %d tasks (%s)", where, len(after), len(before), asked)
    return after
