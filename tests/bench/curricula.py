"""Curricula on the quickstart's sums, with the real loop: held-out accuracy by level, and area under its curve.

python -m tests.bench.curricula --seeds 41 42 43 44 45 --steps 40

One base model a seed, trained once and shared by all curricula. Every run may generate as many rollouts; one that
measures difficulty pays for that with steps. Differences are to `uniform` on the same seed. Runs go two at a time with
one thread each. A run that has ended is read, so that the command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.learners import T95

RECIPE = "recipes/quickstart.yaml"
PROMPTS, GROUP, MEASURED, BATCHES, TASKS = 32, 16, 4, 4, 640
HARDER = [
    "tasks.train.config.max_terms=8",
    f"tasks.train.config.size={TASKS}",
    "tasks.eval.config.max_terms=8",
    "tasks.eval.config.size=240",
    "sft.tasks.config.max_terms=8",
    "sampling.max_new_tokens=48",
    f"prompts_per_step={PROMPTS}",
    f"sampling.group_size={GROUP}",
]
"""The quickstart with 3 to 8 terms, so that there are levels that the base hardly solves, and tasks come twice."""
MIDDLE = "[{steps: 13, at_most: 4}, {steps: 13, at_most: 6}, {}]"
ARMS: dict[str, str] = {
    "uniform": "{use: uniform}",
    "static": "{use: adcl, static: true, difficulty: terms}",
    "adcl": f"{{use: adcl, difficulty: terms, measure_tries: {MEASURED}, batches: {BATCHES}}}",
    "adarft": "{use: adarft, difficulty: terms}",
    "kimi": "{use: kimi, difficulty: terms, warmup_tasks: 320}",
    "learnable": "{use: learnable, difficulty: terms}",
    "learnable-alone": "{use: learnable}",
    "irt": "{use: irt, difficulty: terms}",
    "staged": f"{{use: staged, difficulty: terms, stages: {MIDDLE}}}",
    "difficulty_pool": "{use: difficulty_pool, difficulty: terms}",
    "seta": "{use: seta, ratio: 0.9, epochs: 8}",
    "scalerl": "{use: scalerl}",
}
"""`terms` is the number of terms, a column of the tasks: no rollout is spent on it."""
STUDIED = ["uniform", "static", "adcl", "adarft", "kimi", "learnable", "irt"]


def main() -> None:
    """Run what is not there yet, print tables, write `curricula.json`, `.md` and `.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[41, 42, 43, 44, 45])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=STUDIED)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-curricula"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every command")
    options = parser.parse_args()
    shared = [*HARDER, *options.overrides, f"run_dir={options.out}"]
    with ThreadPoolExecutor(options.side_by_side) as pool:
        bases = [*shared, f"steps={options.steps}"]
        list(pool.map(lambda seed: runs.rlpost("sft", RECIPE, [*bases, f"seed={seed}"], threads=1), options.seeds))
        jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
        results = list(pool.map(lambda job: measure(*job, options, shared), jobs))
    (options.out / "curricula.json").write_text(json.dumps(results, indent=2) + "\n")
    told = f"{table(results)}\n\n{levels(results)}\n"
    (options.out / "curricula.md").write_text(told)
    picture(results, options.out / "curricula.png")
    print(told)


def steps_of(arm: str, steps: int) -> int:
    """Steps that cost at most as many rollouts as `steps` of the others: what adcl enters, but the first, is measured.

    >>> steps_of("uniform", 40), steps_of("adcl", 40)
    (40, 32)
    """
    size, fits = TASKS // BATCHES, steps
    while arm == "adcl" and fits > 1:
        measured = (math.ceil(fits * PROMPTS / size) - 1) * size * MEASURED
        if fits * PROMPTS * GROUP + measured <= steps * PROMPTS * GROUP:
            break
        fits -= 1
    return fits


def measure(arm: str, seed: int, options: argparse.Namespace, shared: Sequence[str]) -> dict[str, Any]:
    """One curriculum on one seed."""
    folder, steps = options.out / f"{arm}-{seed}", steps_of(arm, options.steps)
    if not (folder / "summary.json").exists():
        mine = [f"name={folder.name}", f"seed={seed}", f"steps={steps}", f"curriculum={ARMS[arm]}"]
        quiet = ["save_every=0", "logging.tensorboard=false", "evaluation.n=4", f"evaluation.every={options.every}"]
        runs.rlpost("train", RECIPE, [*shared, *mine, *quiet], threads=1)
    summary = json.loads((folder / "summary.json").read_text())
    curve, trained = read(folder)
    return {
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "before": summary["eval"]["before"],
        "after": summary["eval"]["after"],
        "steps": steps,
        "rollouts": curve[-1][0],
        "measured": sum(line.get("rollouts/measured", 0) for line in trained),
        "spread_frac": statistics.mean(line["groups/spread_frac"] for line in trained),
        "step_s": statistics.median(line["time/step_s"] for line in trained),
        "machine": summary["machine"],
        "versions": summary["versions"],
        "git_commit": summary["git_commit"],
    }


def read(folder: Path) -> tuple[list[tuple[float, float]], list[dict[str, Any]]]:
    """The curve of a run, (rollouts so far, held-out pass@1), and its steps."""
    rollouts, curve, trained = 0.0, [], []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "eval/pass@1" in line:
            curve.append((rollouts, line["eval/pass@1"]))
        elif "rollouts/num" in line:
            rollouts += line["rollouts/num"] + line.get("rollouts/measured", 0)
            trained.append(line)
    return curve, trained


def area(curve: Sequence[Sequence[float]], end: float) -> float:
    """Mean height of the curve from 0 to `end` rollouts, between its points on a straight line.

    >>> area([(0, 0.0), (10, 1.0), (20, 1.0)], 15)
    0.6666666666666666
    """
    total = 0.0
    for (x, y), (x_next, y_next) in pairwise(curve):
        stop = min(x_next, end)
        if stop > x:
            y_stop = y + (y_next - y) * (stop - x) / (x_next - x)
            total += (stop - x) * (y + y_stop) / 2
    return total / end


def table(results: Sequence[dict[str, Any]]) -> str:
    """Accuracy and area of each curriculum, and their paired differences to `uniform`, in points."""
    end = min(result["rollouts"] for result in results)
    head = "| curriculum | pass@1 after, by seed | to uniform | area | to uniform | rollouts | with spread | s a step |"
    lines = [f"Areas: over {end:,.0f} rollouts, evaluation not counted.", "", head, "|---|---|---|---|---|---|---|---|"]
    uniform = {result["seed"]: result for result in results if result["arm"] == "uniform"}
    for arm in dict.fromkeys(result["arm"] for result in results):
        mine = [result for result in results if result["arm"] == arm]
        after = " ".join(f"{result['after']['pass@1']:.3f}" for result in mine)
        pairs = [(one, uniform[one["seed"]]) for one in mine if one["seed"] in uniform]
        gains = [100 * (a["after"]["pass@1"] - b["after"]["pass@1"]) for a, b in pairs]
        areas = [100 * (area(a["curve"], end) - area(b["curve"], end)) for a, b in pairs]
        mean = {key: statistics.mean(one[key] for one in mine) for key in ("rollouts", "spread_frac", "step_s")}
        whole = statistics.mean(area(one["curve"], end) for one in mine)
        lines.append(
            f"| {arm} | {after} | {interval(gains)} | {whole:.3f} | {interval(areas)} | {mean['rollouts']:,.0f} | "
            f"{mean['spread_frac']:.0%} | {mean['step_s']:.2f} |"
        )
    return "\n".join(lines)


def levels(results: Sequence[dict[str, Any]]) -> str:
    """Held-out pass@1 by number of terms, mean over seeds; the base first."""
    names = sorted({key for result in results for key in result["after"] if key.startswith("pass@1/")})
    lines = [f"| | {' | '.join(name.removeprefix('pass@1/') for name in names)} |", f"|{'---|' * (len(names) + 1)}"]
    firsts = {result["seed"]: result["before"] for result in results}
    rows = {"base": list(firsts.values())}
    for arm in dict.fromkeys(result["arm"] for result in results):
        rows[arm] = [result["after"] for result in results if result["arm"] == arm]
    for arm, found in rows.items():
        values = [statistics.mean(one[name] for one in found) for name in names]
        lines.append(f"| {arm} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines)


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a curriculum: each seed's held-out curve, and the mean of `uniform` in grey behind it."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(result["arm"] for result in results))
    by_arm = {arm: [result["curve"] for result in results if result["arm"] == arm] for arm in arms}
    columns = min(4, len(arms))
    figure = Figure(figsize=(3 * columns, 2.6 * math.ceil(len(arms) / columns)), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(arms) / columns), columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, arm in zip(axes, arms, strict=False):
        base = [
            [statistics.mean(column) for column in zip(*points, strict=True)]
            for points in zip(*by_arm[arms[0]], strict=True)
        ]
        panel.plot(*zip(*base, strict=True), color="0.75", linewidth=3, label=f"mean of {arms[0]}")
        for curve in by_arm[arm]:
            panel.plot(*zip(*curve, strict=True), linewidth=1)
        panel.set(title=arm, xlabel="rollouts", ylabel="held-out pass@1", ylim=(0, 1))
        panel.label_outer()
    for panel in axes[len(arms) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences with a 95 % interval of Student's t."""
    if len(differences) < 2 or not any(differences):
        return "-"
    half = T95[min(len(differences), 10)] * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


if __name__ == "__main__":
    main()
