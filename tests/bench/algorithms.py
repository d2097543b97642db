"""Every named algorithm on the quickstart: same base, same steps, held-out accuracy and seconds.

python -m tests.bench.algorithms --seeds 31 32 33 --steps 30

One base model a seed, trained once and shared by all algorithms. Runs go two at a time with one thread each, which on
two cores gives more runs an hour than one at a time; a step's seconds are the median of a run, on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlpost.algorithms import ALGORITHMS
from tests.bench import runs

RECIPE = "recipes/quickstart.yaml"
A_QUARTER = "engine.lr=1.25e-4"
SETTINGS = {"gspo": [A_QUARTER], "kimi_k15": [A_QUARTER]}
"""These take 4 optimizer steps a batch where the others take one, so each is a quarter of the recipe's 5e-4."""


def main() -> None:
    """Run what is not there yet, print a table, write `algorithms.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-algorithms"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every command")
    options = parser.parse_args()
    shared = [*options.overrides, f"run_dir={options.out}", f"steps={options.steps}"]
    with ThreadPoolExecutor(options.side_by_side) as pool:
        list(pool.map(lambda seed: runs.rlpost("sft", RECIPE, [*shared, f"seed={seed}"], threads=1), options.seeds))
        jobs = [(name, seed) for seed in options.seeds for name in options.algorithms]
        results = list(pool.map(lambda job: measure(*job, options.out, shared), jobs))
    (options.out / "algorithms.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def measure(name: str, seed: int, out: Path, shared: Sequence[str]) -> dict[str, Any]:
    """One algorithm on one seed; a run that has ended already is read."""
    folder = out / f"{name}-{seed}"
    if not (folder / "summary.json").exists():
        mine = [f"name={folder.name}", f"seed={seed}", f"algorithm.name={name}", *SETTINGS.get(name, [])]
        runs.rlpost(
            "train",
            RECIPE,
            [*shared, *mine, "save_every=0", "logging.tensorboard=false", "evaluation.by=null"],
            threads=1,
        )
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    return {
        "algorithm": name,
        "seed": seed,
        "before": summary["eval"]["before"],
        "after": summary["eval"]["after"],
        "step_s": statistics.median(step["time/step_s"] for step in steps),
        "rollouts": sum(step["rollouts/num"] for step in steps),
        "discarded_frac": sum(s["tokens/discarded"] for s in steps) / sum(s["tokens/generated"] for s in steps),
        "updates": steps[-1]["optim/steps"],
        "machine": summary["machine"],
        "versions": summary["versions"],
        "git_commit": summary["git_commit"],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown, best first; gains are in points, spread is the standard deviation over seeds."""
    rows = []
    for name in dict.fromkeys(result["algorithm"] for result in results):
        mine = [result for result in results if result["algorithm"] == name]
        gains = [100 * (result["after"]["pass@1"] - result["before"]["pass@1"]) for result in mine]
        after = [f"{result['after']['pass@1']:.3f}" for result in mine]
        mean = {
            key: statistics.mean(result[key] for result in mine) for key in ("step_s", "rollouts", "discarded_frac")
        }
        after8 = statistics.mean(result["after"]["pass@8"] for result in mine)
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        rows.append(
            (
                statistics.mean(gains),
                f"| {name} | {' '.join(after)} | {statistics.mean(gains):+.1f} | {spread:.1f} | {after8:.3f} | "
                f"{mean['step_s']:.2f} | {mean['rollouts']:.0f} | {mean['discarded_frac']:.1%} | "
                f"{mine[0]['updates']:.0f} |",
            )
        )
    head = [
        "algorithm",
        "pass@1 after, by seed",
        "gain",
        "sd",
        "pass@8 after",
        "s a step",
        "rollouts",
        "discarded",
        "updates",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [row for _, row in sorted(rows, reverse=True)])


if __name__ == "__main__":
    main()
