"""What `rlpost simulate pipeline` predicts for finished runs, beside what they measured.

    python -m tests.bench.pipeline_model runs/a [runs/b ...] [--rates runs/c ...]

Lengths, shape and seconds of sync are a run's own. What decoding costs is from the given runs with
`generator.max_staleness=0`, as a pipeline hides it, and what training costs from the run itself; with `--rates` both
are from those runs alone, so that nothing but lengths and sync is known of the run that is predicted. The model knows
no interference: where servers and trainer share cores or memory bandwidth, a pipeline is slower than it says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rlpost.__main__ import quiet
from rlpost.history import read_history
from rlpost.simulate.cluster import Cluster, load
from rlpost.simulate.measured import described, measured_steps
from rlpost.simulate.pipeline_figures import Figures, figures, first_counted, simulated
from rlpost.summary import machine, versions

SEEDS = range(5)
"""Simulations of a run; their mean is the prediction."""


def main() -> None:
    """Compare, print a table, write `pipeline_model.json`."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--rates", nargs="+", type=Path, default=[], help="synchronous runs that rates are taken from")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-pipeline/pipeline_model.json"))
    options = parser.parse_args()
    result = {"runs": measure(options.runs, options.rates), "versions": versions(), "machine": machine()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["runs"]))


def measure(runs: Sequence[Path], rates: Sequence[Path] = ()) -> dict[str, Any]:
    """Each run, predicted and measured."""
    return {str(run): compare(run, [one for one in runs if one != run], rates) for run in runs}


def compare(run: Path, others: Sequence[Path], rates: Sequence[Path]) -> dict[str, Any]:
    """One run: means of a step, after the first steps in which a pipeline fills."""
    cluster = load(None, under=described([run, *others], rates))
    found = [figures(simulated(load(None, [f"seed={seed}"], under=asdict(cluster)))) for seed in SEEDS]
    seen = measured(run, cluster)
    predicted = predictions(found)
    return {
        "cluster": asdict(cluster),
        "measured": seen,
        "predicted": predicted,
        "ratio": predicted["step_s"] / seen["step_s"],
    }


def measured(run: Path, cluster: Cluster) -> dict[str, float]:
    """Means over a run's steps, in whole bursts, but not those in which a pipeline fills or empties."""
    steps, burst = measured_steps(read_history(run)), cluster.waves_ahead + 1
    first = first_counted(cluster) - 1 if cluster.partial_tokens else burst - 1
    num = (len(steps) - first - (burst - 1)) // burst * burst
    steps = steps[first : first + num] or steps
    return {
        "step_s": mean(row["time/step_s"] for row in steps),
        "wait_s": mean(row["time/generate_s"] for row in steps),
        "sync_s": mean(row.get("time/sync_s", 0.0) for row in steps),
        "length": mean(row["rollouts/length_mean"] for row in steps),
    }


def predictions(found: Sequence[Figures]) -> dict[str, float]:
    """The same of simulations."""
    names = ("step_s", "wait_s", "sync_s", "stale_mean", "trainer_frac", "generator_frac")
    return {name: mean(getattr(one, name) for one in found) for name in names}


def table(runs: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| run | k | replicas | prompts x group | length | wait s: run | predicted | step s: run | predicted | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run, one in runs.items():
        cluster, seen, predicted = one["cluster"], one["measured"], one["predicted"]
        apart = cluster["placement"] == "separate"
        replicas = cluster["generator_gpus"] if apart else cluster["gpus"]
        cells = [
            run,
            str(cluster["max_staleness"]),
            f"{replicas // cluster['replicas']['tensor_parallel']} {'apart' if apart else 'colocated'}",
            f"{cluster['prompts_per_step']} x {cluster['group_size']}",
            f"{seen['length']:.1f}",
            *(f"{side[name]:.2f}" for name in ("wait_s", "step_s") for side in (seen, predicted)),
            f"{one['ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Ratio: seconds of a step, predicted over measured."])


if __name__ == "__main__":
    main()
