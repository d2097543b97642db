"""`answers.jsonl`: a line a problem with all that was answered, so that an evaluation goes on where it was cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.manifest import write_json
from rlpost.types import Rollout, Task

ANSWERS, ASKED = "answers.jsonl", "asked.json"


def line_of(name: str, place: int, task: Task, row: Mapping[str, Any], answers: Sequence[Rollout]) -> dict[str, Any]:
    """What is kept of a problem."""
    return {
        "set": name,
        "place": place,
        "key": task.key,
        "row": row,
        "prompt": task.prompt if isinstance(task.prompt, str) else list(task.prompt),
        "answer": task.answer,
        "solution": task.solution,
        "answers": [
            {
                "text": rollout.text,
                "passed": rollout.passed,
                "parts": rollout.reward_parts,
                "tokens": len(rollout.token_ids),
                "finish": rollout.finish_reason,
                **({"turns": [asdict(turn) for turn in rollout.turns]} if rollout.turns else {}),
            }
            for rollout in answers
        ],
    }


def open_folder(out: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that a folder has of the same question; another question is an error."""
    file = out / ASKED
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            if different := sorted(differences(before, asked)):
                raise RunError(
                    f"--out: {out} holds answers to another question, which differs in {', '.join(different[:5])}: "
                    "name another folder, or remove this one"
                )
        write_json(file, asked)
    except (OSError, ValueError) as error:
        raise RunError(f"--out: {out} must be a folder that can be written ({error}): name another") from error
    return read_answers(out)


def read_answers(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a folder; a last line that was cut off is dropped from the file."""
    file = out / ANSWERS
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        file.write_bytes(whole)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise RunError(f"{file} must have one JSON object a line ({error}): remove the folder, or mend it") from None


def append(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and see that they are on the disk."""
    with (out / ANSWERS).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def differences(before: Any, now: Any, where: str = "") -> set[str]:
    """The keys in which two trees of JSON differ.

    >>> differences({"a": {"n": 4}, "b": 1}, {"a": {"n": 8}, "b": 1})
    {'a.n'}
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return {one for key in keys for one in differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))}
    return set() if before == now else {where}
