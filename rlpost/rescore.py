"""`rlpost rescore`: saved rollouts through other rewards."""

from __future__ import annotations

import base64
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rlpost.cluster_recipe import Failure
from rlpost.errors import RecipeError, RunError
from rlpost.history import lines_of
from rlpost.plugins import make_importable
from rlpost.reward_recipe import bind_rewards
from rlpost.talk import Turn
from rlpost.types import Group, Rollout, Task

DROP = Failure(reward="drop")
"""A failure is counted and shown here, and ends nothing."""


@dataclass
class Change:
    """What another reward makes of some rollouts.

    >>> Change().lines()[0]
    'rollouts: 0 of 0 steps'
    """

    rollouts: int = 0
    steps: set[int] = field(default_factory=set)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    passed: Counter[tuple[bool | None, bool | None]] = field(default_factory=Counter)
    """(before, after), by the first reward of each."""
    spread: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    """Groups with different rewards (before, after), of those with two rollouts at least."""
    endings: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For a person."""
        gained, lost = self.passed[False, True], self.passed[True, False]
        groups = sum(self.spread.values())
        had, has = (sum(n for pair, n in self.spread.items() if pair[i]) for i in (0, 1))
        endings = ", ".join(f"{name} {number}" for name, number in sorted(self.endings.items()))
        unjudged = sum(n for pair, n in self.passed.items() if pair[1] is None)
        return [
            f"rollouts: {self.rollouts} of {len(self.steps)} steps",
            f"mean reward: {_mean(self.before)} before, {_mean(self.after)} after",
            f"passed: {self.passed[True, True]} before and after, {gained} only after, {lost} only before",
            f"not judged after: {unjudged}",
            f"groups with different rewards: {had} before, {has} after, of {groups} with two saved rollouts or more",
            f"endings: {endings or 'none'}",
        ]


def rescore_run(
    folder: Path,
    each: Sequence[Mapping[str, Any]],
    of_groups: Sequence[Mapping[str, Any]] = (),
    *,
    show: int = 5,
    out: Path | None = None,
) -> Change:
    """Print what would have changed, and write every verdict to `out`."""
    rows = list(lines_of(folder / "samples.jsonl"))
    if not rows:
        raise RunError(f"{folder}/samples.jsonl must hold rollouts (it has none): see logging.samples_per_step")
    console, tasks = Console(highlight=False), tasks_of(folder)
    if not tasks:
        console.print("note: the run's tasks cannot be read from here: no solution, hints or extra columns")
    if any("token_ids" not in row for row in rows):
        console.print("note: an older run saved no token ids: only their number is right")
    groups = list(groups_of(rows, tasks))
    with closing(bind_rewards(each, DROP, of_groups=of_groups)) as rewards:
        rewards.score([group for _, group in groups])
        rewards.score_groups([group for _, group in groups])
    change = compare(groups)
    saved = "every step's best and worst rollouts are saved, logging.samples_per_step of them: shares are of those"
    for line in [*change.lines(), f"note: {saved}"]:
        console.print(line, markup=False)
    for row, rollout in [pair for pair in pairs(groups) if _passed(pair[0]) != pair[1].passed][:show]:
        console.print(_told(row, rollout), markup=False)
    if out is not None:
        with out.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(_line(row, rollout), ensure_ascii=False) + "\n" for row, rollout in pairs(groups)
            )
        console.print(f"verdicts: {out}", markup=False)
    return change


def tasks_of(folder: Path) -> dict[str, Task]:
    """The run's tasks by key, where its recipe and their files can still be read."""
    from rlpost.recipe import load
    from rlpost.tasks import load_task_sets

    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        return {}
    make_importable(folder)
    try:
        train, held_out = load_task_sets(load(recipe), offline=True)
    except (RunError, RecipeError):
        return {}
    return {task.key: task for task in (*held_out, *train)}


def groups_of(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task]) -> Iterator[tuple[list[Any], Group]]:
    """Saved lines and the group that they make, as far as it was saved."""
    found: dict[tuple[int, Any], list[Any]] = {}
    for i, row in enumerate(rows):
        found.setdefault((row["step"], row.get("group", -1 - i)), []).append(row)
    for number, lines in enumerate(found.values()):
        rollouts = [rollout_of(row, number, tasks) for row in lines]
        yield lines, Group(number, rollouts[0].task, rollouts)


def rollout_of(row: Mapping[str, Any], group: int, tasks: Mapping[str, Task]) -> Rollout:
    """A rollout as far as `samples.jsonl` knows it; log-probs are 0."""
    if "token_ids" in row:
        ids = array("I")
        ids.frombytes(base64.b64decode(row["token_ids"]))
    else:
        ids = array("I", [0] * int(row.get("num_tokens", 0)))
    key = str(row.get("task", ""))
    task = tasks.get(key) or Task(key, str(row.get("prompt", "")), row.get("answer"))
    return Rollout(
        task,
        group,
        prompt_ids=(),
        sampled_prompt_ids=(),
        token_ids=tuple(ids),
        behavior_logp=(0.0,) * len(ids),
        finish_reason=row.get("finish_reason", "stop"),
        version=-1,
        text=str(row.get("completion", "")),
        role=row.get("role", "policy"),
        hint=row.get("hint", ""),
        level=row.get("level", 0),
        turns=tuple(Turn(**turn) for turn in row.get("turns", ())),
    )


def compare(groups: Sequence[tuple[list[Any], Group]]) -> Change:
    """Count what is different."""
    change = Change()
    for rows, group in groups:
        if len(rows) > 1:
            had = len({row["reward"] for row in rows if row["reward"] is not None}) > 1
            change.spread[had, group.has_spread] += 1
    for row, rollout in pairs(groups):
        change.rollouts += 1
        change.steps.add(row["step"])
        change.passed[_passed(row), rollout.passed] += 1
        change.endings.update(f"{name}/{verdict.ending}" for name, verdict in rollout.verdicts.items())
        change.before += [] if row["reward"] is None else [row["reward"]]
        change.after += [] if rollout.reward is None else [rollout.reward]
    return change


def pairs(groups: Sequence[tuple[list[Any], Group]]) -> list[tuple[Any, Rollout]]:
    """Each saved line with its rollout as it is judged now."""
    return [pair for rows, group in groups for pair in zip(rows, group.rollouts, strict=True)]


def _passed(row: Mapping[str, Any]) -> bool | None:
    first = next(iter((row.get("parts") or {}).values()), None)
    return None if first is None else first >= 1


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4g}" if values else "none"


def _told(row: Mapping[str, Any], rollout: Rollout) -> str:
    said = ", ".join(
        f"{name} {verdict.ending}" + (f" ({verdict.note})" if verdict.note else "")
        for name, verdict in rollout.verdicts.items()
    )
    end = row["completion"][-300:]
    return (
        f"\nstep {row['step'] + 1}, task {row['task']}, answer {row['answer']}: {row['reward']} -> {rollout.reward}  "
        f"[{said}]\n{'...' if end != row['completion'] else ''}{end}"
    )


def _line(row: Mapping[str, Any], rollout: Rollout) -> dict[str, Any]:
    return {
        "step": row["step"],
        "group": row.get("group"),
        "task": row["task"],
        "before": {"reward": row["reward"], "parts": row.get("parts")},
        "after": {
            "reward": rollout.reward,
            "parts": rollout.reward_parts,
            "endings": {name: verdict.ending for name, verdict in rollout.verdicts.items()},
            "notes": {name: verdict.note for name, verdict in rollout.verdicts.items() if verdict.note},
        },
    }
