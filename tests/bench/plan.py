"""What `rlpost check --plan` predicts for a recipe, beside what a run of it measured, on the machine that ran it.

    python -m tests.bench.plan --run runs/quickstart [--ranks 1] [--device cpu]

`planned` takes answers half as long as they may be, as the plan does; `at length` the mean length of the run's own
answers, so that what is left is the error of the formulas, rates and overheads and not of the guess.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from rlpost.__main__ import quiet
from rlpost.devices import DEVICES, find_device
from rlpost.errors import RunError
from rlpost.plan import Plan, Step, make_plan, step_of
from rlpost.recipe import load
from rlpost.summary import machine, versions
from rlpost.tasks import load_task_sets

MEASURED = {
    "generate": "time/generate_s",
    "score": "time/score_s",
    "train": "time/train_s",
    "generated": "tokens/generated",
    "completion": "rollouts/length_mean",
}


def main() -> None:
    """Compare, print a table, write `plan.json`."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    parser.add_argument("--ranks", type=int, default=1, help="that the run had")
    parser.add_argument("--device", choices=[*DEVICES, "cpu"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-plan/plan.json"))
    options = parser.parse_args()
    result = compare_run(options.run, options.device, options.ranks)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table({str(options.run): result}))


def measure(folder: Path) -> dict[str, Any]:
    """Every finished run of a folder, on this machine and one rank."""
    found = sorted(file.parent for file in folder.glob("*/summary.json"))
    if not found:
        raise RunError(f"{folder} must hold a finished run: measure `trl` first")
    return {run.name: compare_run(run, None, 1) for run in found}


def compare_run(run: Path, device_name: str | None, ranks: int) -> dict[str, Any]:
    """What is predicted for a run's recipe, beside what the run measured."""
    recipe = load(run / "recipe.yaml")
    tasks, _ = load_task_sets(recipe, offline=True)
    device = find_device(device_name, recipe.model.dtype, ranks=ranks)
    return compare(make_plan(recipe, device, tasks, ranks=ranks), measured(run / "metrics.jsonl"))


def measured(file: Path) -> dict[str, float]:
    """Medians over the run's steps but the first, which warms up."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line for line in lines if MEASURED["train"] in line][1:]
    if not steps:
        raise RunError(f"{file} must hold two steps or more that trained: choose another --run")
    return {name: median(step.get(key, 0.0) for step in steps) for name, key in MEASURED.items()}


def compare(plan: Plan, run: dict[str, float]) -> dict[str, Any]:
    """Predictions with the plan's guess of the length and with the run's own, and prediction over measurement."""
    at_length = predicted(plan, step_of(plan, max(1, round(run["completion"]))))
    return {
        "recipe": plan.recipe.name,
        "device": plan.device.name,
        "rate_flops": plan.device.rate[plan.recipe.model.dtype],
        "bandwidth": plan.device.bandwidth,
        "measured": run,
        "planned": predicted(plan, plan.expected),
        "at length": at_length,
        "ratio": {name: at_length[name] / run[name] for name in MEASURED if run[name]},
        "versions": versions(),
        "machine": machine(),
    }


def predicted(plan: Plan, step: Step) -> dict[str, float]:
    """A step of the plan under the names of `MEASURED`."""
    return {
        "generate": sum(spent for part, spent in step.seconds.items() if part.startswith(("prefill", "decode"))),
        "score": step.seconds["score"],
        "train": step.seconds["train"] + step.seconds["optimizer"],
        "generated": float(step.generated * plan.ranks),
        "completion": float(step.completion),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: medians of the run, and predictions at the run's own length of answers."""
    lines = ["| run | tokens of an answer: run | planned |", "|---|---|---|"]
    for name in ("generate", "score", "train"):
        lines[0] += f" {name} s: run | predicted | ratio |"
        lines[1] += "---|---|---|"
    for run, one in results.items():
        cells = [run, f"{one['measured']['completion']:.0f}", f"{one['planned']['completion']:.0f}"]
        for name in ("generate", "score", "train"):
            ratio = f"{one['ratio'][name]:.2f}" if name in one["ratio"] else "-"
            cells += [f"{one['measured'][name]:.2f}", f"{one['at length'][name]:.2f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Ratio: predicted, at the run's own length of answers, over measured."])


if __name__ == "__main__":
    main()
