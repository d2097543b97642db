"""What a run generated, and how much of it came through each gate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.metrics import metric_info
from rlpost.report.columns import short

Row = Mapping[str, Any]


def funnels(steps: Sequence[Row]) -> list[dict[str, Any]]:
    """The funnels that a run's figures allow; each a title and stages of (label, number)."""
    found = [_groups(steps), _rollouts(steps), _tokens(steps), _hints(steps), _synthesis(steps)]
    return [funnel for funnel in found if len(funnel["stages"]) > 1]


def funnel_of_file(folder: Path) -> list[dict[str, Any]]:
    """The funnel of `rlpost synth`, where the run's folder has one: what each stage let through of what was sampled."""
    path = folder / "synth" / "funnel.json"
    if not path.exists():
        return []
    stages = [one for one in json.loads(path.read_text(encoding="utf-8")) if one["stage"] != "identify"]
    found = _stages("Synthesis before the run", *((one["stage"].replace("_", " "), one["out"]) for one in stages))
    return [found] if len(found["stages"]) > 1 else []


def total(steps: Sequence[Row], name: str) -> float:
    """A sum over the run."""
    return float(sum(row.get(name) or 0.0 for row in steps))


def weighted(steps: Sequence[Row], share: str, of: str) -> float:
    """The sum over the run of a share times what it is a share of."""
    return float(sum((row.get(share) or 0.0) * (row.get(of) or 0.0) for row in steps))


def _stages(title: str, *stages: tuple[str, float]) -> dict[str, Any]:
    return {"title": title, "stages": [[label, short(value)] for label, value in stages] if stages[0][1] else []}


def _groups(steps: Sequence[Row]) -> dict[str, Any]:
    return _stages(
        "Groups",
        ("generated", total(steps, "groups/num")),
        ("with differing rewards", weighted(steps, "groups/spread_frac", "groups/num")),
        ("trained on", total(steps, "groups/trained")),
    )


def _rollouts(steps: Sequence[Row]) -> dict[str, Any]:
    generated = total(steps, "rollouts/num") + total(steps, "guided/num")
    return _stages("Rollouts", ("generated", generated), ("trained on", generated - total(steps, "rollouts/discarded")))


def _tokens(steps: Sequence[Row]) -> dict[str, Any]:
    generated = total(steps, "tokens/generated")
    return _stages("Tokens", ("generated", generated), ("trained on", generated - total(steps, "tokens/discarded")))


def _hints(steps: Sequence[Row]) -> dict[str, Any]:
    asked = total(steps, "explore/rollouts")
    stages = [
        ("asked for by explorers", asked),
        ("under a hint", total(steps, "guided/num")),
        ("of these passed", weighted(steps, "guided/solved_frac", "guided/num")),
        ("answers of an expert", total(steps, "expert/num")),
        ("tasks newly solved, alone", total(steps, "explore/newly_solved")),
    ]
    kept = [stages[0], *(stage for stage in stages[1:] if stage[1])]
    return _stages("Exploration", *kept)


def _synthesis(steps: Sequence[Row]) -> dict[str, Any]:
    """Counts of what synthesis made and what each of its filters let through, in the order in which they are logged."""
    names = dict.fromkeys(name for row in steps for name in row if name.startswith("synth/"))
    counts = [name for name in names if metric_info(name).reduction == "sum"]
    stages = [(name.partition("/")[2].replace("_", " "), total(steps, name)) for name in counts]
    return _stages("Synthesis", *stages) if stages else {"title": "Synthesis", "stages": []}


def by_level(steps: Sequence[Row]) -> list[list[Any]]:
    """(level of the hint, share of answers under it that passed), as a mean over the steps that had some."""
    prefix = "guided/solved_frac/level_"
    levels = sorted({name[len(prefix) :] for row in steps for name in row if name.startswith(prefix)})
    table = []
    for level in levels:
        values = [value for row in steps if (value := row.get(prefix + level)) is not None]
        table.append([level, short(sum(values) / len(values)) if values else None])
    return table
