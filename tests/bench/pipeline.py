"""A pipelined step against a synchronous one, at equal resources: two server replicas and one trainer.

python -m tests.bench.pipeline --steps 12

Answers have a heavy tail: tasks of 3 to 24 terms, with a limit that cuts few; all groups are trained, with spread or
without, so that a step has as much to do in every run. Runs of one base
follow one another: servers with k = 0, with k = 1 and 2 in order, with k = 2 first come, and vLLM in the trainer's
process. A step counts with the median of a run, without its first two steps; the ratio is that of these medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import runs

RECIPE = "recipes/quickstart.yaml"
LONG = [
    "model.context=256",
    "sampling.max_new_tokens=200",
    "sft.steps=300",
    "sft.tasks.config.max_terms=24",
    "tasks.train.config={split: train, size: 4000, min_terms: 3, max_terms: 24, max_total: 9}",
    "tasks.eval=null",
    "batch.row_tokens=null",
    "algorithm.groups.without_spread=keep",
]
SERVERS = ["generator.kind=remote_vllm", "generator.servers.replicas=2"]
ARMS = {
    "servers, k = 0": SERVERS,
    "servers, k = 1": [*SERVERS, "generator.max_staleness=1"],
    "servers, k = 2": [*SERVERS, "generator.max_staleness=2"],
    "servers, k = 2, first come": [*SERVERS, "generator.max_staleness=2", "generator.first_come=true"],
    "colocated": [],
}
SHOWN = {
    "generate": "time/generate_s",
    "train": "time/train_s",
    "sync": "time/sync_s",
    "update": "servers/update_s",
    "length": "rollouts/length_mean",
    "p90": "rollouts/length_p90",
    "age": "pipeline/age_mean",
    "length bias": "pipeline/length_bias",
    "spanning": "pipeline/several_versions_frac",
}


def main() -> None:
    """Run what is not there yet, print a table, write `pipeline.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=91)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-pipeline"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    options = parser.parse_args()
    shared = [*LONG, *options.overrides, f"run_dir={options.out}", f"steps={options.steps}", f"seed={options.seed}"]
    results = {arm: measure(arm, options.out, shared) for arm in options.arms}
    (options.out / "pipeline.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def measure(arm: str, out: Path, shared: Sequence[str]) -> dict[str, Any]:
    """The figures of one run; one that has ended already is read."""
    folder = out / arm.replace(" = ", "").replace(", ", "-").replace(" ", "-")
    if not (folder / "summary.json").exists():
        quiet = ["save_every=0", "logging.tensorboard=false", "logging.samples_per_step=0"]
        runs.rlpost("train", RECIPE, [*shared, *quiet, *ARMS[arm], f"name={folder.name}"], threads=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step_s" in line][2:]
    found = {name: statistics.median(values) for name, key in SHOWN.items() if (values := known(steps, key))}
    return found | {"step": statistics.median(step["time/step_s"] for step in steps), "steps": len(steps)}


def known(steps: Sequence[dict[str, Any]], key: str) -> list[float]:
    """A figure of the steps that have it."""
    return [step[key] for step in steps if step.get(key) is not None]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Seconds of a step, the ratio to the first arm, and where they went."""
    first = next(iter(results.values()))["step"]
    heads = ["", "s a step", "times as fast", *SHOWN]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for arm, found in results.items():
        shown = [f"{found[name]:.2f}" if name in found else "" for name in SHOWN]
        lines.append(f"| {arm} | {found['step']:.2f} | {first / found['step']:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
