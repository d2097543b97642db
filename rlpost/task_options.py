"""`rlpost tasks`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from rlpost.chosen import QUANTILES


def add_tasks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost tasks` and its options."""
    what = "what the tasks of a recipe are: counts, lengths, answers, duplicates, overlap with what is held out"
    command = commands.add_parser("tasks", help=what, description=what)
    command.add_argument("recipe", help="a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as tasks.decontaminate.ngram=8")
    what = "lengths in tokens, as the recipe's model sees the prompts (default: in words); the tokenizer is loaded"
    command.add_argument("--tokens", action="store_true", help=what)
    command.add_argument("--fast", action="store_true", help="do not compare all training prompts with each other")
    command.add_argument("--json", action="store_true", help="all of it as JSON, for programs")
    command.set_defaults(run=tasks)


def tasks(options: argparse.Namespace) -> None:
    """`rlpost tasks`."""
    from rlpost.check import load_and_check
    from rlpost.task_report import report_of

    recipe = load_and_check(options.recipe, options.overrides)
    renderer = None
    if options.tokens:
        from rlpost.model_source import model_folder
        from rlpost.run import make_renderer
        from rlpost.world import World

        renderer = make_renderer(recipe, model_folder(recipe, World()))
    report = report_of(recipe, renderer, near=not options.fast)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else text_of_report(report))


def text_of_report(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    parts = [_source(where, one, report["unit"]) for where, one in report["sources"].items()]
    if report["eval"] is not None:
        parts.append(_source("tasks.eval", report["eval"], report["unit"]))
    funnel = ", ".join(f"{count} {name}" for name, count in report["funnel"].items())
    parts.append([f"training tasks: {report['used']} ({funnel})"])
    parts += [_overlap(report["overlap"]), _near(report["near_duplicates"])]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _source(where: str, one: Mapping[str, Any], unit: str) -> list[str]:
    head = f"{where}: {one['name']}"
    lines = [head, "-" * len(head)]
    if "rows" in one:
        weight = "" if one["weight"] is None else f" by its weight of {one['weight']:g}"
        lines.append(f"rows {one['rows']}, distinct {one['distinct']}, kept {one['kept']}, used {one['used']}")
        lines.append(f"share of a step: {one['share']:.1%}{weight}")
    else:
        lines.append(f"tasks {one['tasks']}")
    lengths = zip(QUANTILES, one["prompt_length"] or (), strict=False)
    lines.append(f"prompt in {unit}: " + ", ".join(f"{_quantile(q)} {length:.0f}" for q, length in lengths))
    if one["numeric_answers_frac"] is not None:
        often = ", ".join(f"{_short(answer)} ({count})" for answer, count in one["most_frequent_answers"].items())
        lines.append(f"answers: {one['numeric_answers_frac']:.0%} are numbers; most frequent: {often}")
    lines.append(f"with a solution: {one['with_solution_frac']:.0%}, with hints: {one['with_hints_frac']:.0%}")
    for name, counts in one["columns"].items():
        lines.append(f"{name}: " + ", ".join(f"{_short(value)} ({count})" for value, count in counts.items()))
    return lines


def _overlap(found: Mapping[str, Any]) -> list[str]:
    if not found["held_out"]:
        return ["overlap with held-out problems: none are given (tasks.eval, tasks.decontaminate.against)"]
    lines = [
        f"like one of {found['held_out']} held-out problems, beyond those that are the same: {found['tasks']['ngram']} "
        f"tasks share a run of {found['ngram']} words, {found['tasks']['near']} more are near (Jaccard >= "
        f"{found['near']:g})"
    ]
    for pair in found["most"]:
        lines += [f"  {pair['share']:.2f}  {_short(pair['train'], 100)}", f"  held  {_short(pair['held_out'], 100)}"]
    return lines


def _near(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [f"near an earlier training task (Jaccard >= {found['threshold']:g}): {found['tasks']}"]
    for pair in found["most"]:
        lines += [f"  {pair['similarity']:.2f}  {_short(pair['again'], 100)}", f"  first {_short(pair['first'], 100)}"]
    return lines


def _quantile(q: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(q, f"{q:.0%}")


def _short(value: object, width: int = 24) -> str:
    return textwrap.shorten(" ".join(str(value).split()), width, placeholder="...") or "''"
