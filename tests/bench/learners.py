"""Every curriculum on simulated learners: rollouts to a target against uniform, and the order of difficulty it finds.

python -m tests.bench.learners --seeds 0 1 2 3 4 5 6 7

No model and no generator: `tests/learners.py` has the formulas. Writes `results/curricula_simulated.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from curricula.adarft import Adarft
from curricula.adcl import Adcl
from curricula.difficulty_pool import DifficultyPool
from curricula.irt import Irt
from curricula.kimi import Kimi
from curricula.learnable import Learnable
from curricula.scalerl import Scalerl
from curricula.seta import Seta
from curricula.staged import Staged
from curricula.uniform import Uniform
from rlpost.summary import git_commit
from tests.learners import WORLDS, Course, course

STAGES = [{"steps": 40, "at_most": 2}, {"steps": 40, "at_most": 4}, {}]
LEVEL: Mapping[str, Any] = {"difficulty": "level"}
ARMS: dict[str, Callable[..., Any]] = {
    "uniform": Uniform,
    "scalerl": Scalerl,
    "staged, by level": partial(Staged, stages=STAGES, **LEVEL),
    "difficulty_pool": DifficultyPool,
    "adarft, by level": partial(Adarft, **LEVEL),
    "kimi": Kimi,
    "kimi, warm-up by level": partial(Kimi, **LEVEL),
    "learnable": Learnable,
    "learnable, by level": partial(Learnable, **LEVEL),
    "learnable, power: 4": partial(Learnable, power=4.0),
    "learnable, weight: mixed": partial(Learnable, weight="mixed"),
    "irt": partial(Irt, text=False),
    "irt, by level": partial(Irt, text=False, **LEVEL),
    "irt, window: [null, 0]": partial(Irt, text=False, window=[None, 0.0]),
    "seta": Seta,
    "adcl, by level": partial(Adcl, measure_tries=4, **LEVEL),
    "adcl, static, by level": partial(Adcl, static=True, **LEVEL),
    "adcl, measured from the start": partial(Adcl, measure_tries=4),
}
PAGE = Path("results/curricula_simulated.md")
READING = "## Reading"
ABOUT = """
1,000 tasks, 32 prompts x 8 answers a step. The learners are a formula, which stands in `tests/learners.py`, and no
language models: what follows says how the curricula work, and not what they are worth.

Rollouts: until mean success on what can be learnt is 0.7, measurements counted, median over seeds. Ratio: to uniform on
the same seed, geometric mean with a 95 % interval of Student's t; below 1 is faster. Order: Spearman's correlation of
the curriculum's difficulties with the true ones at that moment, over all tasks that can be learnt, mean over seeds.
`by level`: given a column of six levels that follows the true difficulty with noise.
"""
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t for a 95 % interval, by number of seeds."""


def main() -> None:
    """Run every arm in every world on every seed, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-learners"))
    options = parser.parse_args()
    started = time.monotonic()
    courses = {
        world: {arm: [course(make, WORLDS[world], seed) for seed in options.seeds] for arm, make in ARMS.items()}
        for world in WORLDS
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"world": world, "arm": arm, "seed": seed, "rollouts": one.rollouts, "correlation": one.correlation}
        for world, arms in courses.items()
        for arm, found in arms.items()
        for seed, one in zip(options.seeds, found, strict=True)
    ]
    (options.out / "learners.json").write_text(json.dumps({"commit": git_commit(), "rows": rows}, indent=2) + "\n")
    write_page(courses, options.seeds, time.monotonic() - started)


def write_page(courses: dict[str, dict[str, list[Course]]], seeds: Sequence[int], seconds: float) -> None:
    """The tables; what stands below `## Reading` is kept, as it is written by hand."""
    reading = PAGE.read_text().partition(READING)[2] if PAGE.exists() else "\n"
    command = f"python -m tests.bench.learners --seeds {' '.join(map(str, seeds))}"
    commit = (git_commit() or "unknown")[:12]
    told = f"`{command}`, {seconds / 60:.0f} minutes, commit `{commit}`."
    lines = ["# Curricula on simulated learners", "", told, ABOUT]
    for world, arms in courses.items():
        lines += [f"## {world[0].upper()}{world[1:]}", "", table(arms), ""]
    PAGE.write_text("\n".join([*lines, READING]) + reading)
    print(PAGE.read_text())


def table(arms: dict[str, list[Course]]) -> str:
    """One world as Markdown."""
    lines = ["| curriculum | rollouts | ratio to uniform | order | reached |", "|---|---|---|---|---|"]
    for arm, found in arms.items():
        pairs = list(zip(found, arms["uniform"], strict=True))
        logs = [math.log(a.rollouts / b.rollouts) for a, b in pairs if a.rollouts and b.rollouts]
        known = [one.rollouts for one in found if one.rollouts]
        median = f"{statistics.median(known):,.0f}" if known else "-"
        order = [one.correlation for one in found if one.correlation is not None]
        shown = f"{statistics.mean(order):.2f}" if order else "-"
        lines.append(f"| {arm} | {median} | {interval(logs)} | {shown} | {len(known)} of {len(found)} |")
    return "\n".join(lines)


def interval(logs: Sequence[float]) -> str:
    """Geometric mean and its interval."""
    if len(logs) < 2:
        return "-"
    mean = statistics.mean(logs)
    half = T95[min(len(logs), 10)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"


if __name__ == "__main__":
    main()
