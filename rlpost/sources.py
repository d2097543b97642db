"""Where rows come from: JSONL, parquet, the hub, `reasoning_gym`, or a function; each row knows its place."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.plugins import USER_CODE_ERRORS, argument_problems, did_you_mean, resolve, user_error
from rlpost.recipe import TaskSource

FORMS = "`file.jsonl`, `file.parquet`, `hf:owner/name[:config]:split`, `reasoning_gym:name`, or `pkg.module:function`"
HUB = re.compile(r"hf:([^:]+)(?::([^:]+))?:([^:\[]+(?:\[.*\])?)")


@dataclass(frozen=True, slots=True)
class Row:
    """One row, or what is wrong with it.

    >>> Row("line 3", {"prompt": "1+1=", "answer": "2"}).place
    'line 3'
    """

    place: str
    columns: Mapping[str, Any] | str
    """The cells by column; text where the row could not be read: the problem."""


def kind_of(path: str) -> str:
    """`file`, `hf`, `reasoning_gym` or `function`.

    >>> kind_of("data/train.jsonl"), kind_of("hf:openai/gsm8k:main:train"), kind_of("mylab.data:sums")
    ('file', 'hf', 'function')
    """
    for prefix in ("hf", "reasoning_gym"):
        if path.startswith(f"{prefix}:"):
            return prefix
    return "function" if ":" in path else "file"


def source_problems(source: TaskSource, where: str) -> list[str]:
    """What can be said of a source without reading it."""
    kind = kind_of(source.path)
    problems = []
    if source.limit is not None and source.limit < 1:
        problems.append(f"{where}.limit must be >= 1, or null for all rows (got {source.limit})")
    if source.answer_regex is not None and source.answer is None:
        problems.append(f"{where}.answer_regex needs {where}.answer")
    if source.config and kind in ("file", "hf"):
        problems.append(f"{where}.config is for reasoning_gym and function sources (got {source.path}): remove it")
    checks = {
        "file": _file_problems,
        "hf": _hub_problems,
        "reasoning_gym": _gym_problems,
        "function": _function_problems,
    }
    return problems + checks[kind](source, where)


def read_rows(source: TaskSource, where: str) -> Iterator[Row]:
    """The first `limit` rows."""
    if problems := source_problems(source, where):
        raise RunError("\n".join(problems))
    readers = {"file": _read_file, "hf": _read_hub, "reasoning_gym": _read_gym, "function": _read_function}
    return itertools.islice(readers[kind_of(source.path)](source, where), source.limit)


def _file_problems(source: TaskSource, where: str) -> list[str]:
    path = Path(source.path).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        return [f"{where}.path must be {FORMS} (got {source.path!r})"]
    if path.is_file():
        return []
    folder = path.parent
    hint = did_you_mean(path.name, [file.name for file in folder.iterdir()] if folder.is_dir() else [])
    return [
        f"{where}.path: the file {source.path} does not exist{hint or '; relative paths start at the current folder'}"
    ]


def _hub_problems(source: TaskSource, where: str) -> list[str]:
    if HUB.fullmatch(source.path):
        return []
    return [f"{where}.path must be `hf:owner/name:split` or `hf:owner/name:config:split` (got {source.path!r})"]


def _gym_problems(source: TaskSource, where: str) -> list[str]:
    if isinstance(source.config.get("seed"), int):
        return []
    found = source.config.get("seed", "none")
    return [
        f"{where}.config.seed must be an integer (got {found}): every rank draws the same problems; keep the seeds of "
        "train and eval further apart than their sizes, because item i is drawn with seed + i"
    ]


def _function_problems(source: TaskSource, where: str) -> list[str]:
    try:
        function = resolve(source.path, "")
    except RunError as error:
        return [f"{where}.path: {error}"]
    return argument_problems(function, source.config, where=f"{where}.config", use=source.path)


def _read_file(source: TaskSource, where: str) -> Iterator[Row]:
    path = Path(source.path).expanduser()
    return _read_parquet(path, where, source.limit) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    blank: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                blank.append(Row(f"line {number}", "must be one JSON object a line (this one is empty)"))
                continue
            yield from blank  # a gap between rows often is a lost row; empty lines at the end mean nothing
            blank.clear()
            yield Row(f"line {number}", _parse_line(line))


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return f"must be UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        return f"must be one JSON object a line ({error.msg} at column {error.colno})"
    return (
        row if isinstance(row, dict) else f'must be a JSON object, as in {{"prompt": ...}} (got {type(row).__name__})'
    )


def _read_parquet(path: Path, where: str, limit: int | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=min(limit or 1024, 1024))
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield Row(f"row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{where}.path: {path} must be a parquet file ({error})") from error


def _read_hub(source: TaskSource, where: str) -> Iterator[Row]:
    import datasets
    import httpx

    found = HUB.fullmatch(source.path)
    assert found is not None, "source_problems has matched it"
    name, config, split = found.groups()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise RunError(
            f"{where}.path: {source.path} cannot be loaded from the hub ({type(error).__name__}: {error}); check the "
            "name, the configuration and the split, or download it and give the file's path"
        ) from error
    return (Row(f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_gym(source: TaskSource, where: str) -> Iterator[Row]:
    """Metadata becomes columns, so that templates and `extra` can name them."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name = source.path.removeprefix("reasoning_gym:")
    if name not in DATASETS:
        raise RunError(f"{where}.path: reasoning_gym has no task `{name}`{did_you_mean(name, DATASETS)}")
    try:
        entries = reasoning_gym.create_dataset(name, **source.config)
    except (TypeError, AssertionError, ValueError) as error:
        raise RunError(f"{where}.config does not fit reasoning_gym's `{name}`: {error}") from error
    return (
        Row(f"item {number}", {**entry["metadata"], "prompt": entry["question"], "answer": entry["answer"]})
        for number, entry in enumerate(entries, start=1)
    )


def _read_function(source: TaskSource, where: str) -> Iterator[Row]:
    function = resolve(source.path, "")
    try:
        for number, row in enumerate(function(**source.config), start=1):
            fits = isinstance(row, Mapping)
            yield Row(f"row {number}", row if fits else f"must be a dict of columns (got {type(row).__name__})")
    except USER_CODE_ERRORS as error:
        raise RunError(f"{where}.path: `{source.path}` failed: {user_error(error)}") from error
