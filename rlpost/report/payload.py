"""Everything that the page shows of some runs, as one tree of plain JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.alarms import RULES, alarms_of
from rlpost.clock import OUTSIDE_STEP
from rlpost.history import History, lines_of
from rlpost.metrics import metric_info
from rlpost.report.columns import choice_columns, eval_columns, short, step_columns
from rlpost.report.facts import facts
from rlpost.report.funnels import by_level, funnel_of_file, funnels, total

OF_ONE_RUN = ("name", "seed", "run_dir", "resume")
"""Fields in which runs of one arm differ."""


def payload(
    histories: Sequence[History], rollouts: Sequence[Mapping[str, Any]], fits: Mapping[str, Any]
) -> dict[str, Any]:
    """The page's data; `rollouts` has the columns of each run's samples."""
    names = distinct([history.name for history in histories])
    runs = [run_of(history, name) for history, name in zip(histories, names, strict=True)]
    for run, columns in zip(runs, rollouts, strict=True):
        run["rollouts"] = columns
    known = sorted({name for run in runs for part in ("steps", "evals") for name in run[part]["figures"]})
    return {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "runs": runs,
        "arms": arms_of(histories),
        "info": {name: about(name) for name in known},
        "diff": differences([history.recipe for history in histories]),
        "fits": fits,
        "outside": sorted(OUTSIDE_STEP),
    }


def run_of(history: History, name: str) -> dict[str, Any]:
    """One run."""
    steps = history.steps
    recipe = history.folder / "recipe.yaml"
    return {
        "name": name,
        "folder": str(history.folder),
        "state": state_of(history),
        "summary": facts(history),
        "steps": step_columns(history),
        "evals": eval_columns(history),
        "alarms": [
            {
                "title": alarm.title,
                "step": alarm.step + 1,
                "said": alarm.said,
                "advice": alarm.advice,
                "active": alarm.active,
            }
            for alarm in alarms_of(history.rows)
        ],
        "rules": [rule.title for rule in RULES.values()],
        "chosen": choice_columns(list(lines_of(history.folder / "chosen.jsonl"))),
        "funnels": funnels(steps) + funnel_of_file(history.folder),
        "levels": by_level(steps),
        "phases": phases_of(history),
        "memory": (history.summary or {}).get("memory"),
        "versions": (history.summary or {}).get("versions") or {},
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
    }


def state_of(history: History) -> str:
    """Whether the run is done, in words."""
    done = history.steps[-1]["step"] + 1 if history.steps else 0
    if history.summary is not None:
        return f"finished, {done} steps"
    return f"{done} of {history.total_steps} steps, not finished"


def phases_of(history: History) -> dict[str, float | None]:
    """Seconds by phase of the whole run."""
    known = (history.summary or {}).get("phase_s")
    if known:
        return {name: short(value, 4) for name, value in known.items()}
    names = {name for row in history.steps for name in row if name.startswith("time/") and name != "time/step_s"}
    return {name[len("time/") : -len("_s")]: short(total(history.steps, name), 4) for name in sorted(names)}


def about(name: str) -> list[str]:
    """Unit and meaning of a figure; a run of another version may have figures that are not declared here."""
    try:
        info = metric_info(name)
    except ValueError:
        return ["", ""]
    return [info.unit, info.meaning]


def distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that were there before.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    found: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name} ({number})"
        found.append(candidate)
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a recipe by dotted path; a list of plug-ins by place and key.

    >>> flat({"a": {"b": 1}, "c": [{"use": "x"}]})
    {'a.b': 1, 'c.0.use': 'x'}
    """
    items = enumerate(tree) if isinstance(tree, list) else tree.items()
    found: dict[str, Any] = {}
    for key, value in items:
        where = f"{prefix}{key}"
        nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value))
        found |= flat(value, f"{where}.") if nested and value else {where: value}
    return found


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """(field, value in each recipe) where they differ; a field that one does not have is `-` there."""
    leaves = [flat(recipe) for recipe in recipes]
    fields = dict.fromkeys(field for one in leaves for field in one)
    table = [[field, *(said(one[field]) if field in one else "-" for one in leaves)] for field in fields]
    return [row for row in table if len(set(row[1:])) > 1]


def said(value: Any) -> str:
    """A leaf as a recipe says it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def arms_of(histories: Sequence[History]) -> list[int]:
    """For each run the number of its arm: runs of one recipe that differ by their seed alone."""
    seen: list[dict[str, Any]] = []
    found = []
    for history in histories:
        leaves = {field: value for field, value in flat(history.recipe).items() if field not in OF_ONE_RUN}
        if leaves not in seen or not leaves:
            seen.append(leaves)
        found.append(seen.index(leaves) if leaves else len(seen) - 1)
    return found
