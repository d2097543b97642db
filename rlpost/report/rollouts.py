"""Rollouts for the page: columns to filter and sort by, and the texts in compressed parts that are opened when read."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpost.history import lines_of
from rlpost.report.columns import evenly, short

IN_A_PART = 100
MOST_BYTES = 48_000_000
"""Of `samples.jsonl` that go into a page; of more, the rollouts of evenly spaced steps."""
LONGEST = 60_000
"""Characters of one text."""


def compressed(value: Any) -> str:
    """JSON, deflated without a header, as base64: what a browser's DecompressionStream reads."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    data = deflate.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))
    return base64.b64encode(data + deflate.flush()).decode()


def read_rollouts(folder: Path, most_bytes: int = MOST_BYTES) -> tuple[dict[str, Any], list[str]]:
    """The columns, and the compressed parts, of a run's samples."""
    path = folder / "samples.jsonl"
    every = list(lines_of(path))
    rows, size = every, path.stat().st_size if path.exists() else 0
    if size > most_bytes:
        steps = sorted({row["step"] for row in every})
        kept = {steps[i] for i in evenly(len(steps), max(1, len(steps) * most_bytes // size))}
        rows = [row for row in every if row["step"] in kept]
    parts = [compressed([text_of(row) for row in rows[i : i + IN_A_PART]]) for i in range(0, len(rows), IN_A_PART)]
    return columns_of(rows) | {"of": len(every), "in_a_part": IN_A_PART}, parts


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the list shows and filters by; words as numbers of a list."""
    tasks = list(dict.fromkeys(str(row.get("task")) for row in rows))
    roles = list(dict.fromkeys(str(row.get("role", "policy")) for row in rows))
    ends = list(dict.fromkeys(str(row.get("finish_reason")) for row in rows))
    task_at, role_at, end_at = ({name: i for i, name in enumerate(names)} for names in (tasks, roles, ends))
    return {
        "tasks": tasks,
        "roles": roles,
        "ends": ends,
        "step": [row["step"] + 1 for row in rows],
        "task": [task_at[str(row.get("task"))] for row in rows],
        "role": [role_at[str(row.get("role", "policy"))] for row in rows],
        "end": [end_at[str(row.get("finish_reason"))] for row in rows],
        "reward": [short(row.get("reward"), 4) for row in rows],
        "tokens": [short(row.get("num_tokens")) for row in rows],
        "gist": [gist(row) for row in rows],
    }


def gist(row: dict[str, Any]) -> str:
    """The beginning of the problem, on one line."""
    return " ".join(str(row.get("prompt", ""))[:200].split())[:60]


def text_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the reader shows of one rollout."""
    figures = row.get("tokens") if isinstance(row.get("tokens"), dict) else None
    shown: dict[str, Any] = {name: cut(row.get(name)) for name in ("prompt", "completion", "answer")}
    shown["parts"] = row.get("parts") or {}
    if row.get("turns"):
        shown["turns"] = [[turn["writer"], turn["num_tokens"]] for turn in row["turns"]]
    if row.get("hint"):
        shown |= {"hint": cut(row["hint"]), "level": row.get("level")}
    if figures is not None and len(str(row.get("completion", ""))) <= LONGEST:
        shown["figures"] = figures
    return shown


def cut(text: Any) -> str | None:
    """A text that is not too long for a page."""
    if text is None:
        return None
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n... ({len(text) - LONGEST} more characters)"
