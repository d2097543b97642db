"""What staleness does to learning, with and without a correction: same base, same number of updates.

python -m tests.bench.staleness --seeds 81 82 83 84 85

Rollouts are begun k steps ahead by vLLM in the trainer's process, so a run's staleness is exactly k and two runs of a
seed are equal. Without correction the loss takes rollouts for the present policy's. Clipped, as by default, PPO's
bounds are around the policy mu that wrote them. Corrected, a token counts by pi / mu, at most 2 (`tis_token`). Runs go
two at a time with one thread each; what is in `--out` is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.curricula import interval

RECIPE = "recipes/quickstart.yaml"
BYPASS = ["algorithm.mismatch={mode: bypass, weights: []}"]
NONE = ["algorithm.mismatch={mode: decoupled, weights: []}"]
WEIGHTS = ["algorithm.mismatch={mode: decoupled, weights: [{use: tis_token}]}"]
ARMS = {
    "k = 0": NONE,
    "k = 1": [*NONE, "generator.max_staleness=1"],
    "k = 1, clipped": [*BYPASS, "generator.max_staleness=1"],
    "k = 1, corrected": [*WEIGHTS, "generator.max_staleness=1"],
    "k = 4": [*NONE, "generator.max_staleness=4"],
    "k = 4, clipped": [*BYPASS, "generator.max_staleness=4"],
    "k = 4, corrected": [*WEIGHTS, "generator.max_staleness=4"],
}


def main() -> None:
    """Run what is not there yet, print a table, write `staleness.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[81, 82, 83, 84, 85])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-staleness"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every command")
    options = parser.parse_args()
    shared = [*options.overrides, f"run_dir={options.out}", f"steps={options.steps}"]
    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = list(pool.map(lambda seed: one_seed(seed, options, shared), options.seeds))
    (options.out / "staleness.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def one_seed(seed: int, options: argparse.Namespace, shared: Sequence[str]) -> dict[str, Any]:
    """Every arm of one seed, one after the other."""
    return {"seed": seed} | {arm: measure(arm, seed, options.out, shared) for arm in options.arms}


def measure(arm: str, seed: int, out: Path, shared: Sequence[str]) -> dict[str, Any]:
    """One run; one that has ended already is read."""
    folder = out / f"{arm.replace(' = ', '').replace(', ', '-')}-{seed}"
    if not (folder / "summary.json").exists():
        quiet = ["save_every=0", "logging.tensorboard=false", "logging.samples_per_step=0", "evaluation.by=null"]
        mine = [f"name={folder.name}", f"seed={seed}", *ARMS[arm], *quiet]
        runs.rlpost("train", RECIPE, [*shared, *mine], threads=1)
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "reward/mean" in line]
    found = {
        "before": summary["eval"]["before"]["pass@1"],
        "after": summary["eval"]["after"]["pass@1"],
        "updates": steps[-1]["optim/steps"],
        "machine": summary["machine"],
        "git_commit": summary["git_commit"],
    }
    for name in ("mismatch/k3", "mismatch/ess_frac", "policy/entropy"):
        if values := [step[name] for step in steps if name in step]:
            found[name] = statistics.mean(values)
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Held-out pass@1 by seed; differences in points, paired by seed, to the first arm and the same k uncorrected."""
    arms = [name for name in results[0] if name != "seed"]
    keys = [key for key in ("mismatch/k3", "mismatch/ess_frac") if key in results[0][arms[0]]]
    heads = ["", "before", "after, by seed", "mean", "against k = 0", "against uncorrected", "updates", *keys]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for arm in arms:
        after = [one[arm]["after"] for one in results]

        def against(other: str, after: Sequence[float] = after) -> str:
            pairs = zip(after, results, strict=True)
            return interval([100 * (x - one[other]["after"]) for x, one in pairs]) if other in arms else "-"

        before = statistics.mean(one[arm]["before"] for one in results)
        cells = [f"{before:.3f}", " ".join(f"{x:.3f}" for x in after), f"{statistics.mean(after):.3f}"]
        cells += [against(arms[0]), against(arm.partition(",")[0]), f"{results[0][arm]['updates']:.0f}"]
        cells += [f"{statistics.mean(one[arm][key] for one in results):.4f}" for key in keys]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
