"""Hints: where they come from, how they stand in a prompt, and whether they give the answer away."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlpost.errors import RunError
from rlpost.types import Task

SOURCES = ("column", "solution", "answer", "file")
UNITS = ("steps", "words", "characters")
COPY_LENGTH = 8
"""Characters of the pieces by which a copied hint is recognised."""


@dataclass(frozen=True)
class HintSource:
    """How a task's hints are found, weak to strong.

    `column`: `tasks.train.hints`; `file`: what `rlpost hints` wrote; `solution`: its first parts; `answer`: the answer.
    """

    use: str = "column"
    levels: tuple[float, ...] = ()
    """Of a solution: shares of it above 0, or negative whole numbers, -2 for all but its last two units."""
    unit: str = "steps"
    separator: str = "\n"
    """What ends a step."""
    written: Mapping[str, Sequence[str]] | None = None
    """Hints by the task's key, from a file."""

    def of(self, task: Task) -> list[str]:
        """The hints of a task, from the weakest on; [] where there are none."""
        if self.use == "column":
            return [hint for hint in task.hints if hint]
        if self.use == "file":
            return list((self.written or {}).get(task.key, ()))
        if self.use == "answer":
            return [task.answer] if task.answer else []
        return [] if not task.solution else first_parts(task.solution, self.levels, self.unit, self.separator)


def first_parts(solution: str, levels: Sequence[float], unit: str, separator: str) -> list[str]:
    """The beginnings of a solution, each longer than the one before; one that is empty is left out.

    >>> first_parts("7-0=7;7+6=13;#13", [0.4, -1], "steps", ";")
    ['7-0=7;', '7-0=7;7+6=13;']
    >>> first_parts("abcdefgh", [0.25, 1.0], "characters", "")
    ['ab', 'abcdefgh']
    """
    units = _units(solution, unit, separator)
    found: list[str] = []
    for level in levels:
        count = len(units) + int(level) if level < 0 else int(level * len(units) + 1e-9) or min(1, len(units))
        part = "".join(units[: max(0, count)])
        if part and (not found or len(part) > len(found[-1])):
            found.append(part)
    return found


def _units(text: str, unit: str, separator: str) -> list[str]:
    if unit == "characters":
        return list(text)
    if unit == "words":
        return re.findall(r"\s*\S+", text)
    pieces = text.split(separator)
    return [piece + separator for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])


def with_hint(task: Task, hint: str, template: str) -> Task:
    """The task with a hint in its prompt; of messages, in the last one.

    >>> with_hint(Task("a", "1+1="), "think of two", "{prompt} ({hint})").prompt
    '1+1= (think of two)'
    """
    if isinstance(task.prompt, str):
        return replace(task, prompt=fill(template, task, task.prompt, hint))
    *before, last = (dict(message) for message in task.prompt)
    last["content"] = fill(template, task, last["content"], hint)
    return replace(task, prompt=[*before, last])


def fill(template: str, task: Task, prompt: str, hint: str) -> str:
    """The template with its fields filled in; braces in what is filled in, or of other words, stay as they are.

    >>> fill("{prompt} {x} {hint}", Task("a", ""), "{hint}", "h")
    '{hint} {x} h'
    """
    fields = {"prompt": prompt, "hint": hint, "answer": task.answer or "", "solution": task.solution or ""}
    return re.sub(r"\{(prompt|hint|answer|solution)\}", lambda match: fields[match[1]], template)


def leaks(hint: str, answer: str | None) -> bool:
    """Whether the answer stands in the hint as a word of its own.

    >>> leaks("then 13 - 3 = 10", "10"), leaks("there are 100 of them", "10"), leaks("10.5 kg", "10")
    (True, False, False)
    """
    if not answer or not answer.strip():
        return False
    return re.search(rf"(?<![\w.]){re.escape(answer.strip())}(?![\w]|\.\d)", hint) is not None


def copied_frac(hint: str, text: str) -> float:
    """How much of the hint stands in the text, in pieces of eight characters.

    >>> copied_frac("first add the tens", "I first add the tens."), copied_frac("first add the tens", "no")
    (1.0, 0.0)
    """
    hint, text = " ".join(hint.split()), " ".join(text.split())
    if not hint:
        return 0.0
    if len(hint) <= COPY_LENGTH:
        return float(hint in text)
    pieces = [hint[i : i + COPY_LENGTH] for i in range(len(hint) - COPY_LENGTH + 1)]
    known = {text[i : i + COPY_LENGTH] for i in range(len(text) - COPY_LENGTH + 1)}
    return sum(piece in known for piece in pieces) / len(pieces)


def read_hints(path: str | Path) -> dict[str, list[str]]:
    """The hints in a file of `rlpost hints`, by the task's key; a last line that was cut off is left out."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise RunError(
            f"explore: guide.path must be a file of hints ({path}: {error.strerror}): write it with `rlpost hints`"
        ) from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found[str(row["key"])] = [str(hint) for hint in row["hints"]]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise RunError(
                f'{path}, line {number}: must be a JSON object such as {{"key": "a1", "hints": ["..."]}} ({error})'
            ) from error
    return found
