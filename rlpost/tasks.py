"""Rows of a file, the hub, `reasoning_gym` or a function become `Task` records; every bad row is named at once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlpost.decontaminate import decontaminated
from rlpost.errors import RunError
from rlpost.plugins import did_you_mean
from rlpost.recipe import Recipe, TaskSource
from rlpost.sources import kind_of, read_rows
from rlpost.task_filters import kept, label
from rlpost.types import Task

log = logging.getLogger(__name__)

SHOWN = 10
"""Problems of one source that are spelled out; the rest are counted."""
SHOWN_KEYS = 5


class _RowProblem(Exception):
    """One thing that is wrong with one row."""


def load_tasks(source: TaskSource, where: str) -> list[Task]:
    """The tasks of one source; `where` is its recipe key, such as `tasks.train`."""
    build = _row_builder(source, where)
    problems: dict[str, list[str]] = defaultdict(list)
    tasks = []
    for row in read_rows(source, where):
        if isinstance(row.columns, str):
            problems[row.columns].append(row.place)
            continue
        try:
            tasks.append(build(row.columns))
        except _RowProblem as problem:
            problems[str(problem)].append(row.place)
    if problems:
        raise RunError(_report(problems, source, where))
    if not tasks:
        raise RunError(f"{where}.path must hold at least one task ({source.path} has none)")
    tasks = kept(tasks, source.keep, where)
    if drops_duplicates(source):
        return _without_duplicates(tasks, where)
    return _refuse_duplicates(tasks, where)


def load_training(recipe: Recipe, *, offline: bool = False) -> list[Task]:
    """The tasks of every source, one after the other; what two sources share is refused, or left to the first."""
    sources = recipe.tasks.sources
    found: list[Task] = []
    for where, source in sources.items():
        tasks = [] if _out_of_reach(source, offline) else load_tasks(source, where)
        if found and tasks:
            tasks = _without_earlier(tasks, found, drop=drops_duplicates(source), where=where)
        found += tasks
    return found


def check_overlap(train: Sequence[Task], evaluation: Sequence[Task], *, drop: bool = False) -> list[Task]:
    """The training tasks; one that is also held out, by key or by normalised prompt, is an error, or left out."""
    keys = {task.key for task in evaluation}
    prompts = {_normalised(task.prompt) for task in evaluation}
    shared = [task.key for task in train if task.key in keys or _normalised(task.prompt) in prompts]
    if shared and not drop:
        raise RunError(
            f"tasks.train and tasks.eval must not share problems: {len(shared)} of {len(train)} training tasks are "
            f"also held out (keys {_first(shared)}); take them out of one of the two, or set "
            "tasks.train.duplicates=drop"
        )
    if not shared:
        return list(train)
    log.warning("tasks.train: left out %d of %d tasks that are also in tasks.eval", len(shared), len(train))
    left = [task for task in train if task.key not in set(shared)]
    if not left:
        raise RunError("tasks.train must hold a task that is not in tasks.eval (all are in both)")
    return left


def load_task_sets(recipe: Recipe, *, offline: bool = False) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks, which must not share a problem; `offline`: those on the hub are left empty."""
    source, asked = recipe.tasks.eval, recipe.tasks.decontaminate
    train = load_training(recipe, offline=offline)
    held_out = [] if source is None or _out_of_reach(source, offline) else load_tasks(source, "tasks.eval")
    train = check_overlap(train, held_out, drop=drops_duplicates(recipe.tasks.train))
    return decontaminated(train, [*held_out, *load_against(recipe, offline=offline)], asked), held_out


def load_against(recipe: Recipe, *, offline: bool = False) -> list[Task]:
    """The problems of `tasks.decontaminate.against`."""
    sources = enumerate(recipe.tasks.decontaminate.against)
    where = "tasks.decontaminate.against"
    return [task for i, one in sources if not _out_of_reach(one, offline) for task in load_tasks(one, f"{where}.{i}")]


def _out_of_reach(source: TaskSource, offline: bool) -> bool:
    return offline and kind_of(source.path) == "hf"


def drops_duplicates(source: TaskSource) -> bool:
    """Whether repeated problems are left out rather than refused; `reasoning_gym` draws with replacement."""
    return source.duplicates == "drop" or kind_of(source.path) == "reasoning_gym"


def _row_builder(source: TaskSource, where: str) -> Callable[[Mapping[str, Any]], Task]:
    """A function from one row's columns to its task, with templates and the regex compiled once."""
    prompt = _column(source.prompt, f"{where}.prompt")
    answer = _column(source.answer, f"{where}.answer") if source.answer else None
    solution = _column(source.solution, f"{where}.solution") if source.solution else None
    pattern = _compiled(source.answer_regex, f"{where}.answer_regex")
    mapped = {source.prompt, source.answer, source.solution, source.key, *source.hints}
    takes_all = kind_of(source.path) in ("reasoning_gym", "function")

    def build(columns: Mapping[str, Any]) -> Task:
        text = _prompt(prompt(columns), f"{where}.prompt")
        key = _text(_get(columns, source.key, f"{where}.key"), f"{where}.key") if source.key else _hash(text)
        if source.key and not key:
            raise _RowProblem(f"{where}.key: the column `{source.key}` must not be empty")
        extra = {name: _get(columns, name, f"{where}.extra") for name in source.extra}
        if takes_all:
            extra |= {name: value for name, value in columns.items() if name not in mapped}
        return Task(
            key=key,
            prompt=text,
            answer=_answer(answer(columns), pattern, source, where) if answer else None,
            solution=_text(solution(columns), f"{where}.solution") or None if solution else None,
            hints=_hints(columns, source.hints, f"{where}.hints"),
            extra=extra,
            source=label(source),
        )

    return build


def _column(spec: str, where: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a column, or fills a template such as `"{Body} {Question}"`."""
    if "{" not in spec and "}" not in spec:
        return lambda columns: _get(columns, spec, where)
    try:
        pieces = list(string.Formatter().parse(spec))
    except ValueError as error:
        raise RunError(
            f"{where} must be a column or a template with balanced braces, {{{{ for a brace ({error})"
        ) from None
    if any(name == "" for _, name, _, _ in pieces):
        raise RunError(f"{where}: `{{}}` names no column; write {{{{}}}} for braces in the text (got {spec!r})")

    def fill(columns: Mapping[str, Any]) -> str:
        return "".join(
            text + (_text(_get(columns, name, where), where) if name is not None else "") for text, name, _, _ in pieces
        )

    return fill


def _get(columns: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in columns:
        found = ", ".join(columns) or "none"
        raise _RowProblem(f"{where}: no column `{name}`{did_you_mean(name, columns)} (the columns are {found})")
    return columns[name]


def _text(value: Any, where: str) -> str:
    """Text of a cell; 72 and 72.0 are both "72", so that an answer does not depend on the file's number format."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # a missing number in parquet is NaN
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise _RowProblem(f"{where} must be text or a number (got {type(value).__name__} {str(value)[:40]})")
    return str(int(value)) if value == value // 1 else str(value)


def _prompt(value: Any, where: str) -> str | tuple[dict[str, str], ...]:
    if isinstance(value, list | tuple):
        fits = all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
        if not fits or not value:
            raise _RowProblem(f"{where} must be text or messages with `role` and `content` (got {str(value)[:80]})")
        return tuple({"role": message["role"], "content": message["content"]} for message in value)
    text = _text(value, where)
    if not text.strip():
        raise _RowProblem(f"{where} must not be empty")
    return text


def _answer(value: Any, pattern: re.Pattern[str] | None, source: TaskSource, where: str) -> str:
    text = _text(value, f"{where}.answer").strip()
    if pattern is not None and text:
        found = pattern.search(text)
        if found is None:
            raise _RowProblem(f"{where}.answer_regex {pattern.pattern!r} must match the answer")
        text = (found.group(1 if pattern.groups else 0) or "").strip()
    if not text:
        raise _RowProblem(
            f"{where}.answer: a task must have an answer in `{source.answer}` (fill it in, or set {where}.answer=null "
            "where no reward needs one)"
        )
    return text


def _hints(columns: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, ...]:
    """Hints weak to strong; a column may hold one or a list of them, or be empty."""
    cells: list[Any] = []
    for name in names:
        value = _get(columns, name, where)
        cells += value if isinstance(value, list | tuple) else [value]
    return tuple(text for cell in cells if (text := _text(cell, where)))


def _compiled(regex: str | None, where: str) -> re.Pattern[str] | None:
    try:
        return re.compile(regex) if regex else None
    except re.error as error:
        raise RunError(f"{where} must be a regular expression ({error} in {regex!r})") from None


def _hash(prompt: str | Sequence[Mapping[str, str]]) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def _normalised(prompt: str | Sequence[Mapping[str, str]]) -> str:
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return " ".join(text.casefold().split())


def _refuse_duplicates(tasks: list[Task], where: str) -> list[Task]:
    keys = [key for key, count in Counter(task.key for task in tasks).items() if count > 1]
    if keys:
        raise RunError(
            f"{where}: keys must be unique, and {len(keys)} are not ({_first(keys)}); the same key is the same prompt "
            f"where {where}.key is not set; take them out, or set {where}.duplicates=drop"
        )
    return _refuse_repeats(tasks, where)


def _refuse_repeats(tasks: list[Task], where: str) -> list[Task]:
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        by_prompt[_hash(task.prompt)].append(task.key)
    repeated = [" = ".join(keys) for keys in by_prompt.values() if len(keys) > 1]
    if repeated:
        raise RunError(
            f"{where}: prompts must be unique, and {len(repeated)} have several keys ({_first(repeated)}); take them "
            f"out, or set {where}.duplicates=drop"
        )
    return tasks


def _without_duplicates(tasks: list[Task], where: str) -> list[Task]:
    """The first of each key and of each prompt."""
    kept: list[Task] = []
    keys: set[str] = set()
    prompts: set[str] = set()
    for task in tasks:
        prompt = _hash(task.prompt)
        if task.key not in keys and prompt not in prompts:
            kept.append(task)
        keys.add(task.key)
        prompts.add(prompt)
    if len(kept) < len(tasks):
        log.warning("%s: dropped %d of %d tasks as duplicates", where, len(tasks) - len(kept), len(tasks))
    return kept


def _without_earlier(tasks: list[Task], earlier: Sequence[Task], *, drop: bool, where: str) -> list[Task]:
    """The tasks that no earlier source has, by key or by prompt."""
    keys, prompts = {task.key for task in earlier}, {_hash(task.prompt) for task in earlier}
    left = [task for task in tasks if task.key not in keys and _hash(task.prompt) not in prompts]
    if len(left) < len(tasks) and not drop:
        shared = [task.key for task in tasks if task.key in keys or _hash(task.prompt) in prompts]
        raise RunError(
            f"{where}: no earlier source may have the same problems, and {len(shared)} are there already "
            f"({_first(shared)}); take them out, or set {where}.duplicates=drop"
        )
    if not left:
        raise RunError(f"{where} must have a task that no earlier source has (all {len(tasks)} are there already)")
    if len(left) < len(tasks):
        log.warning("%s: dropped %d of %d tasks that an earlier source has", where, len(tasks) - len(left), len(tasks))
    return left


def _report(problems: Mapping[str, Sequence[str]], source: TaskSource, where: str) -> str:
    bad = sum(len(places) for places in problems.values())
    lines = [f"{where}: {bad} row{'s' * (bad != 1)} of {source.path} cannot be used:"]
    for message, places in list(problems.items())[:SHOWN]:
        lines.append(f"  - {_first(places)}: {message}")
    if len(problems) > SHOWN:
        lines.append(f"  - and {len(problems) - SHOWN} more kinds of problem")
    return "\n".join(lines)


def _first(items: Sequence[str]) -> str:
    more = f" and {len(items) - SHOWN_KEYS} more" if len(items) > SHOWN_KEYS else ""
    return ", ".join(items[:SHOWN_KEYS]) + more
