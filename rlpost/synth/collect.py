"""The end of the pipeline: kept problems as tasks, the others with their reason, and how many came through what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlpost.synth.pipeline import Stage, rejected
from rlpost.synth.rows import Row, consensus
from rlpost.synth.store import digest, head_of, read

LAST = "problems"
"""What comes after the last filter: a problem whose solutions agree on no answer is none, whatever the filters let
through."""
PROBLEMS, QUARANTINE, FUNNEL = "problems.jsonl", "quarantine.jsonl", "funnel.json"


def collect(stages: Sequence[Stage], folder: Path) -> list[dict[str, Any]]:
    """Write the three files, each whole or not at all; the funnel is returned."""
    gone = rejected(stages, folder)
    for row in read(folder / "distil"):
        if row["id"] not in gone and consensus(row["solutions"])[0] is None:
            gone[row["id"]] = LAST, "no answer"
    facts = {stage.name: _facts(stage, folder) for stage in stages if stage.is_filter}
    common = lineage(stages, folder)
    after = [LAST, *(name for name in facts if name.startswith("filters"))]
    _write(folder / PROBLEMS, (_kept(row, common, facts) for row in read(folder / "distil") if row["id"] not in gone))
    before = (row for row in read(folder / "sample") if gone.get(row["id"], ("",))[0].startswith("screen"))
    later = (row for row in read(folder / "distil") if gone.get(row["id"], ("",))[0] in after)
    _write(folder / QUARANTINE, (_left_out(row, gone, common, facts) for rows in (before, later) for row in rows))
    found = funnel(stages, folder)
    last = sum(name == LAST for name, _ in gone.values())
    came = found[-1]["out"]
    found.append({"stage": LAST, "in": came, "out": came - last, "reasons": {"no answer": last} if last else {}})
    _write_text(folder / FUNNEL, json.dumps(found, indent=2) + "\n")
    return found


def lineage(stages: Sequence[Stage], folder: Path) -> dict[str, Any]:
    """What all problems of a run share: where they come from."""
    settings = {stage.kind: head_of(folder / stage.name).get("settings", {}) for stage in stages}
    made = json.loads((folder / "train" / "generator.json").read_text()) if (folder / "train").is_dir() else {}
    return {
        "seed_set": digest(head_of(folder / "identify")),
        "identify": settings["identify"],
        "generator": made.get("model"),
        "generator_problems": made.get("problems"),
        "teacher": settings["distil"],
    }


def _facts(stage: Stage, folder: Path) -> dict[str, dict[str, Any]]:
    """What a filter has said of each row beside its reason."""
    rows = read(folder / stage.name)
    return {row["id"]: {key: x for key, x in row.items() if key not in ("id", "reason")} for row in rows}


def _kept(row: Row, common: dict[str, Any], facts: dict[str, dict[str, dict[str, Any]]]) -> Row:
    answer, place, share = consensus(row["solutions"])
    chosen = row["solutions"][place]
    passed = {name: found[row["id"]] for name, found in facts.items()}
    return {
        "key": row["id"],
        "prompt": row["prompt"],
        "answer": answer,
        "solution": whole_text(chosen),
        "agreement": round(share, 4),
        "difficulty": _difficulty(passed),
        "lineage": {**common, "seed": row["seed"], "filters": passed},
    }


def _difficulty(passed: dict[str, dict[str, Any]]) -> float | None:
    """1 - pass rate of the policy, where a filter has measured that."""
    for found in reversed(passed.values()):
        if found.get("tries") and "passes" in found:
            return 1 - float(found["passes"]) / float(found["tries"])
    return None


def whole_text(solution: dict[str, Any]) -> str:
    """What supervised training imitates: the reasoning, where there is one apart, and what follows.

    >>> whole_text({"reasoning": "", "text": "1+1=2"})
    '1+1=2'
    """
    if not solution["reasoning"]:
        return str(solution["text"])
    return f"<think>\n{solution['reasoning']}\n</think>\n\n{solution['text']}"


def _left_out(row: Row, gone: dict[str, tuple[str, str]], common: dict[str, Any], facts: dict[str, Any]) -> Row:
    name, reason = gone[row["id"]]
    said = {one: found[row["id"]] for one, found in facts.items() if row["id"] in found}
    return {**row, "filter": name, "reason": reason, "lineage": {**common, "seed": row["seed"], "filters": said}}


def funnel(stages: Sequence[Stage], folder: Path) -> list[dict[str, Any]]:
    """For each stage: how many rows came in and stayed, and why the others went."""
    found: list[dict[str, Any]] = []
    for stage in stages:
        if stage.kind == "train":
            continue
        rows, reasons = 0, Counter[str]()
        for row in read(folder / stage.name):
            rows += 1
            if stage.kind == "identify" and not row["difficult"]:
                reasons["not difficult" if row["score"] is not None else "not measured"] += 1
            elif stage.is_filter and row["reason"]:
                reasons[row["reason"]] += 1
        kept = rows - sum(reasons.values())
        found.append({"stage": stage.name, "in": rows, "out": kept, "reasons": dict(reasons.most_common())})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The funnel as Markdown.

    >>> print(table([{"stage": "sample", "in": 4, "out": 4, "reasons": {}}]))
    | stage | in | out | why the others went |
    |---|---|---|---|
    | sample | 4 | 4 |  |
    """
    lines = ["| stage | in | out | why the others went |", "|---|---|---|---|"]
    for one in found:
        why = ", ".join(f"{reason} {count}" for reason, count in one["reasons"].items())
        lines.append(f"| {one['stage']} | {one['in']} | {one['out']} | {why} |")
    return "\n".join(lines)


def picture(found: Sequence[dict[str, Any]], path: Path) -> None:
    """The funnel as a picture: what came out of each stage, what went in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.45 * len(found) + 1), layout="constrained")
    axes = figure.subplots()
    names = [one["stage"] for one in found]
    axes.barh(names, [one["in"] for one in found], color="0.85")
    axes.barh(names, [one["out"] for one in found], color="tab:blue")
    for i, one in enumerate(found):
        axes.text(one["out"], i, f" {one['out']:,}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("problems")
    figure.savefig(path, dpi=120)


def _write(path: Path, rows: Iterator[Row]) -> None:
    whole = path.with_name(path.name + ".tmp")
    with whole.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    whole.replace(path)


def _write_text(path: Path, text: str) -> None:
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)
