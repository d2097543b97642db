"""Wide groups and hints on the testbed: arms that share one base a seed, compared in pairs.

    python -m tests.bench.exploration hints --seeds 51 52 53 54 55
    python -m tests.bench.exploration width --seeds 51 52 53 54 55

`hints`: sums of 6 to 8 terms, of which the base has only seen shorter ones alone and long ones behind a hint.
`width`: sums of 4 to 8 terms, of which N = 8 learns what the base can already do and then stops; from there N = 8 to
512, at equal steps and at equal rollouts.
Runs go two at a time with one thread each. What is in `--out` already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.quickstart import log_ends

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for two-sided 95 % intervals of the mean of so many differences."""
COIN = "rewards=[{use: exact_chain, weight: 0.0}, {use: 'tests.bench.jobs:coin'}]"
"""The first reward says what evaluation counts; the second alone is trained on."""
HOME, WIDE = "recipes/guide_grpo.yaml", "recipes/brorl.yaml"
LONGER = [f"tasks.{split}.config.max_terms=8" for split in ("train", "eval")]
TRAINED, WITHOUT = ["model.init=null", "sft=null"], ["explore=[]"]
QUIET = ["save_every=0", "logging.tensorboard=false", "logging.samples_per_step=2"]


@dataclass(frozen=True)
class Arm:
    """One way to train from a seed's base."""

    recipe: str
    overrides: tuple[str, ...] = ()
    steps: float = 1.0
    """Of the study's steps."""


def hint_arms() -> dict[str, Arm]:
    """Plain GRPO and what shows hints or solutions; the first is what the others are compared with."""
    plain = ("algorithm.name=grpo", "algorithm.loss.clip_high=0.2", "explore=[]")
    return {
        "grpo": Arm(HOME, plain),
        "grpo, all-fail groups kept": Arm(HOME, (*plain, "algorithm.groups.without_spread=keep")),
        "grpo, 4 to 8 terms": Arm(HOME, (*plain, "tasks.train.config.min_terms=4")),
        "guide, 4 to 8 terms": Arm(HOME, ("tasks.train.config.min_terms=4",)),
        "random reward": Arm(HOME, (*plain, COIN)),
        "guide": Arm(HOME),
        "guide, ratio unshaped": Arm(HOME, ("algorithm.off_policy.loss=importance",)),
        "guide, mixed group": Arm(
            HOME, ("explore.0.place=failures", "explore.0.k=4", "algorithm.off_policy.statistics=pooled")
        ),
        "guide_ppo": Arm("recipes/guide_ppo.yaml"),
        "luffy": Arm("recipes/luffy.yaml"),
        "ghpo": Arm("recipes/ghpo.yaml"),
        "scaf_grpo": Arm("recipes/scaf_grpo.yaml"),
        "egsr": Arm("recipes/egsr.yaml"),
    }


def width_arms() -> dict[str, Arm]:
    """N = 8 to 512 with 8 prompts a step: at equal steps, and with as many rollouts as N = 128 has."""

    def arm(n: int, steps: float = 1, *more: str, trained: str = "") -> Arm:
        explorers = f"[{{use: broaden, width: {n}, chunk: 64{trained}}}]" if n > 8 else "[]"
        return Arm(WIDE, ("sampling.group_size=8", f"explore={explorers}", *more), steps)

    return {
        "N=8": arm(8),
        "N=32": arm(32),
        "N=128": arm(128),
        "N=512": arm(512),
        "N=512, trained on 64": arm(512, trained=", train: 64"),
        "N=8, rate of N=512": arm(8, 1, "engine.lr=4e-4"),
        "N=8, rollouts of N=128": arm(8, 16),
        "N=512, rollouts of N=128": arm(512, 0.25),
        "N=128, random reward": arm(128, 1, COIN),
    }


def main() -> None:
    """Run what is not there yet, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["hints", "width"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[51, 52, 53, 54, 55])
    parser.add_argument("--arms", nargs="+", help="only these; the first is what the others are compared with")
    parser.add_argument("--steps", type=int, help="(default: 20 for hints, 12 for width)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-exploration"))
    parser.add_argument("--side-by-side", type=int, default=2)
    options = parser.parse_args()
    out, steps = options.out / options.study, options.steps or {"hints": 20, "width": 12}[options.study]
    arms = {"hints": hint_arms, "width": width_arms}[options.study]()
    arms = {name: arms[name] for name in options.arms or arms}
    out.mkdir(parents=True, exist_ok=True)
    make_base = {"hints": hint_base, "width": width_base}[options.study]
    with ThreadPoolExecutor(options.side_by_side) as pool:
        bases = dict(zip(options.seeds, pool.map(lambda seed: make_base(seed, out), options.seeds), strict=True))
        jobs = [(name, seed) for seed in options.seeds for name in arms]
        results = list(pool.map(lambda job: measure(*job, arms[job[0]], bases[job[1]], steps=steps, out=out), jobs))
        if options.study == "hints":
            results += pool.map(lambda seed: control(seed, bases[seed], results, out), options.seeds)
    (out / f"{options.study}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results, next(iter(arms))))


def hint_base(seed: int, out: Path) -> list[str]:
    """The overrides that start from the seed's supervised model."""
    own = [f"seed={seed}", f"sft.tasks.config.seed={seed}"]
    model = runs.base_model(HOME, out, own, threads=1)
    return [f"run_dir={out}", f"seed={seed}", f"model.path={model}", "model.init=null", "sft=null"]


def width_base(seed: int, out: Path) -> list[str]:
    """The same for a model that N = 8 has trained until it stopped; the rate grows with the root of the rollouts."""
    folder, mine = out / f"base-{seed}", [f"seed={seed}", f"sft.tasks.config.seed={seed}", *LONGER]
    if not (folder / "model/config.json").exists():
        model = runs.base_model(WIDE, out, [*mine, *WITHOUT], threads=1)
        loop = ["steps=60", "prompts_per_step=32", "sampling.group_size=8", "save_every=60", "evaluation.every=20"]
        start = [f"run_dir={out}", f"name={folder.name}", f"model.path={model}", *TRAINED, *WITHOUT]
        runs.rlpost("train", WIDE, [*mine[:1], *LONGER, *start, *loop, "engine.lr_rollouts=256"], threads=1)
        runs.export(folder)
    small = ["prompts_per_step=8", "engine.lr=5e-5", "engine.lr_rollouts=64", "engine.warmup_steps=2"]
    start = [f"run_dir={out}", f"seed={seed}", f"model.path={folder / 'model'}", *TRAINED]
    return [*start, *LONGER, *small, "algorithm.groups.max_waves=1"]


def measure(name: str, seed: int, arm: Arm, base: Sequence[str], *, steps: int, out: Path) -> dict[str, Any]:
    """One arm on one seed; a run that has ended is read."""
    folder = out / f"{name.replace(' ', '-').replace(',', '').replace('=', '')}-{seed}"
    if not (folder / "summary.json").exists():
        mine = [f"name={folder.name}", f"steps={max(1, round(steps * arm.steps))}", "evaluation.n=16"]
        runs.rlpost("train", arm.recipe, [*base, *arm.overrides, *mine, *QUIET], threads=1)
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if "groups/num" in line]
    return {
        "arm": name,
        "seed": seed,
        "before": summary["eval"]["before"],
        "after": summary["eval"]["after"],
        "steps": len(taken),
        "updates": taken[-1]["optim/steps"],
        "tokens": sum(line["tokens/generated"] for line in taken),
        "rollouts": sum(line["rollouts/num"] + line.get("guided/num", 0) for line in taken),
        "seconds": sum(line["time/step_s"] for line in taken),
        "newly_solved": sum(line.get("explore/newly_solved", 0) for line in taken),
        "guided_solved": mean_of(taken, "guided/solved_frac"),
        "guided_trained": mean_of(taken, "guided/trained_frac"),
        "ratio_p50": mean_of(taken, "guided/ratio_p50"),
        "peak_gib": summary["memory"]["peak_gib"] if summary["memory"] else None,
        "git_commit": summary["git_commit"],
        "machine": summary["machine"],
    }


def control(seed: int, base: Sequence[str], results: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Further supervised training on fresh demonstrations of the base's kind, for the seconds of the `guide` run."""
    shared, model = list(base[:2]), Path(base[2].partition("=")[2])
    guide = next(one for one in results if one["seed"] == seed and one["arm"] == "guide")
    first, last = log_ends(model)
    pace_s = (last["unix_s"] - first["unix_s"]) / (last["step"] - first["step"])
    more = [f"sft.max_seconds={guide['seconds']}", f"sft.steps={max(1, int(guide['seconds'] / pace_s))}"]
    more += [f"sft.tasks.config.seed={seed + 1000}", "sft.tasks.config.size=40000"]
    trained = runs.base_model(HOME, out, [f"seed={seed}", *base[2:4], *more], threads=1)
    shown = runs.rlpost("eval", HOME, [*shared, f"model.path={trained}", *base[3:], "evaluation.n=16"], threads=1)
    after = json.loads(shown[shown.index("{\n") :])
    return {"arm": "further SFT", "seed": seed, "before": guide["before"], "after": after, "seconds": guide["seconds"]}


def mean_of(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    """The mean over the steps that have the figure."""
    found = [line[key] for line in lines if key in line]
    return statistics.fmean(found) if found else None


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of differences, in points."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    half = 100 * T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


def table(results: Sequence[dict[str, Any]], against: str) -> str:
    """The results as Markdown; differences in pass@1 are paired by seed and in points."""
    head = [
        "arm",
        "pass@1 before",
        "after",
        "gain",
        f"against {against}",
        "pass@16 after",
        "rollouts",
        "s",
        "newly solved",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    reference = {one["seed"]: one["after"]["pass@1"] for one in results if one["arm"] == against}
    for name in dict.fromkeys(one["arm"] for one in results):
        mine = [one for one in results if one["arm"] == name]
        before, after = ([one[when]["pass@1"] for one in mine] for when in ("before", "after"))
        gains = [b - a for a, b in zip(before, after, strict=True)]
        paired = [one["after"]["pass@1"] - reference[one["seed"]] for one in mine]
        cells = [
            name,
            f"{statistics.fmean(before):.3f}",
            f"{statistics.fmean(after):.3f}",
            interval(gains),
            "" if name == against else interval(paired),
            f"{statistics.fmean(one['after']['pass@16'] for one in mine):.3f}",
            *(
                f"{statistics.fmean(one[key] for one in mine):.0f}" if key in mine[0] else ""
                for key in ("rollouts", "seconds", "newly_solved")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
