"""`rlpost try-reward`: what a reward says of a few answers, before a run depends on it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlpost.cluster_recipe import Failure
from rlpost.errors import RunError
from rlpost.history import lines_of
from rlpost.judging import shape_of
from rlpost.plugins import load_file, resolve
from rlpost.rescore import groups_of, tasks_of
from rlpost.reward_recipe import bind_rewards
from rlpost.types import Group, Rollout, Task

TASK = Task("example", "What is 6 * 12?", answer="72", solution="6 * 12 = 72\n#### 72")
EXAMPLES = (
    "6 * 12 = 72\n#### 72",
    "The answer is 72.",
    r"So it is $\boxed{72}$.",
    "6 * 12 = 71\n#### 71",
    "It may be 71 or 72.",
    "",
    "I do not know.",
    "72 " * 2000,
    r"\boxed{9^{9^{9^{9^9}}}}",
    "\U0001d7d5\U0001d7d0 \u4e03\u5341\u4e8c \u0667\u0662",
)
"""Right in several ways, wrong, undecided, empty, very long, expensive, and in other digits."""


def try_on(
    plugins: Sequence[Mapping[str, Any]],
    *,
    answers: Path | None = None,
    run: Path | None = None,
    most: int = 16,
    seconds: float = 5.0,
) -> None:
    """Print a table of verdicts; a reward that failed anywhere is an error, after the table."""
    plugins = [one for plugin in plugins for one in in_file(plugin)]
    each = [plugin for plugin in plugins if shape_of(resolve(plugin["use"], "rewards")) != "group"]
    of_groups = [plugin for plugin in plugins if plugin not in each]
    groups = groups_to_try(answers, run, most)
    limits = Failure(reward="drop", reward_s=seconds)
    with closing(bind_rewards(each, limits, of_groups=of_groups)) as rewards:
        rewards.score(groups)
        rewards.score_groups(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    Console(highlight=False).print(table(rollouts))
    failed = [verdict for rollout in rollouts for verdict in rollout.verdicts.values() if verdict.failed]
    if failed:
        notes = "\n".join(f"  - {note}" for note in dict.fromkeys(verdict.note for verdict in failed))
        raise RunError(
            f"a reward must judge every answer or return None, and failed {len(failed)} times; in a run each would end "
            f"it, unless on_error is drop or zero:\n{notes}"
        )


def in_file(plugin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plug-in itself, or where it names a file alone, each reward in that."""
    use = plugin["use"]
    if not use.endswith(".py"):
        return [dict(plugin)]
    module = load_file(use)
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        if next(iter(inspect.signature(value).parameters), "") in ("rollout", "rollouts", "group")
    ]
    if not names:
        raise RunError(
            f"{use} must hold a function whose first parameter is `rollout`, `rollouts` or `group` (none is)"
        )
    return [{**plugin, "use": f"{use}:{name}"} for name in names]


def groups_to_try(answers: Path | None, run: Path | None, most: int) -> list[Group]:
    """Answers of a file, of a run, or the examples here."""
    if run is not None:
        rows = list(lines_of(run / "samples.jsonl"))[-most:]
        if not rows:
            raise RunError(f"{run}/samples.jsonl must hold rollouts (it has none): see logging.samples_per_step")
        return [group for _, group in groups_of(rows, tasks_of(run))]
    if answers is None:
        return [Group(0, TASK, [rollout(TASK, text) for text in EXAMPLES[:most]])]
    groups = []
    for number, row in enumerate(read_answers(answers)[:most]):
        known = ("prompt", "answer", "completion", "solution")
        extra = {name: value for name, value in row.items() if name not in known}
        answer = None if row.get("answer") is None else str(row["answer"])
        task = Task(str(number), row.get("prompt", ""), answer, row.get("solution"), extra=extra)
        groups.append(Group(number, task, [rollout(task, row["completion"], number)]))
    return groups


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file with a `completion` in each."""
    if not file.is_file():
        raise RunError(f"--answers: the file {file} does not exist")
    rows = []
    for number, line in enumerate(filter(str.strip, file.read_text(encoding="utf-8").splitlines()), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"--answers: line {number} of {file} must be JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise RunError(f"--answers: line {number} of {file} must have a text `completion`")
        rows.append(row)
    return rows


def rollout(task: Task, text: str, group: int = 0) -> Rollout:
    """An answer without a model: a token a word, so that lengths mean something."""
    ids = tuple(range(len(text.split())))
    return Rollout(task, group, (), (), ids, (0.0,) * len(ids), finish_reason="stop", version=0, text=text)


def table(rollouts: Sequence[Rollout]) -> Table:
    """A line a verdict."""
    shown = Table("reward", "answer", "value", "ending", "seconds", "said", box=None, pad_edge=False)
    for column in shown.columns[:-1]:
        column.no_wrap = True
    for name in dict.fromkeys(name for one in rollouts for name in one.verdicts):
        for one in rollouts:
            verdict = one.verdicts[name]
            value = "None" if verdict.value is None else f"{verdict.value:.4g}"
            parts = " ".join(f"{part}={x:.3g}" for part, x in verdict.parts.items())
            said = " ".join(filter(None, (parts, verdict.note.replace(f"{Path.cwd()}/", ""))))
            text = one.text if len(one.text) < 30 else f"{one.text[:12]} ... {one.text[-12:]}"
            cells = (name, repr(text), value, verdict.ending, f"{verdict.seconds:.3f}", said)
            shown.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return shown
