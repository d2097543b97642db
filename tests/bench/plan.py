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
    recipe = load(options.run / "recipe.yaml")
    tasks, _ = load_task_sets(recipe, offline=True)
    device = find_device(options.device, recipe.model.dtype, ranks=options.ranks)
    plan = make_plan(recipe, device, tasks, ranks=options.ranks)
    result = compare(plan, measured(options.run / "metrics.jsonl"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(json.dumps(result["ratio"]))


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


def table(result: dict[str, Any]) -> str:
    """The result, to read."""
    lines = [
        f"{result['recipe']} on {result['device']}",
        f"{'':<14}{'run':>12}{'planned':>12}{'at length':>12}{'ratio':>8}",
    ]
    for name in MEASURED:
        values = "".join(f"{result[which][name]:>12.4g}" for which in ("measured", "planned", "at length"))
        ratio = f"{result['ratio'][name]:>8.2f}" if name in result["ratio"] else f"{'-':>8}"
        lines.append(f"{name:<14}{values}{ratio}")
    return "\n".join([*lines, "seconds of a phase and tokens: medians; ratio: at length over run"])


if __name__ == "__main__":
    main()
