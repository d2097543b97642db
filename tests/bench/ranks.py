"""Weak scaling: one rank and two, each with as much work and one thread.

python -m tests.bench.ranks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.against_trl import SMALL, fresh

PROMPTS = 8
"""Of one rank."""
PHASES = ("generate", "train", "sync", "step")


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-ranks"))
    options = parser.parse_args()
    result = measure(options.out, options.steps)
    (options.out / "ranks.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def measure(out: Path, steps: int) -> dict[str, Any]:
    """Median seconds of the phases of a step at one and two ranks, ZeRO-2."""
    work = [f"model.path={runs.base_model(SMALL, out)}", "model.init=null", "sft=null", f"steps={steps}"]
    work += ["tasks.train.config.kind=long", "sampling.max_new_tokens=64"]
    result = {}
    for ranks in (1, 2):
        shape = [f"prompts_per_step={PROMPTS * ranks}"]
        found = runs.train(SMALL, fresh(out / f"ranks-{ranks}"), [*work, *shape], ranks=ranks, threads=1)
        result[str(ranks)] = {phase: runs.median(found, f"time/{phase}_s") for phase in PHASES}
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown; efficiency: the step of one rank over that of two."""
    lines = [f"| ranks | {' s | '.join(PHASES)} s |", f"|{'---|' * (1 + len(PHASES))}"]
    for ranks, one in result.items():
        lines.append(f"| {ranks} | {' | '.join(f'{one[phase]:.2f}' for phase in PHASES)} |")
    return "\n".join([*lines, "", f"Efficiency at 2 ranks: {result['1']['step'] / result['2']['step']:.0%}."])


if __name__ == "__main__":
    main()
