"""What a rollout costs at group sizes 16 to 512, with as many rollouts in every step.

python -m tests.bench.groups
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.against_trl import SMALL, fresh

SIZES = (16, 64, 256, 512)
ROLLOUTS = 512


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-groups"))
    options = parser.parse_args()
    result = measure(options.out, options.steps)
    (options.out / "groups.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def measure(out: Path, steps: int) -> dict[str, Any]:
    """Milliseconds a rollout, by phase, for every group size."""
    model = [f"model.path={runs.base_model(SMALL, out)}", "model.init=null", "sft=null"]
    work = ["tasks.train.config.prompt_tokens=64", "sampling.max_new_tokens=64", f"steps={steps}"]
    result = {}
    for size in SIZES:
        shape = [f"sampling.group_size={size}", f"prompts_per_step={ROLLOUTS // size}"]
        found = runs.train(SMALL, fresh(out / f"groups-{size}"), [*model, *work, *shape])
        phases = {phase: runs.median(found, f"time/{phase}_s") for phase in ("generate", "train", "step")}
        result[str(size)] = {phase: 1000 * seconds / ROLLOUTS for phase, seconds in phases.items()}
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| group size | ms a rollout: generation | training | all of the step |", "|---|---|---|---|"]
    for size, one in result.items():
        lines.append(f"| {size} | {one['generate']:.2f} | {one['train']:.2f} | {one['step']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
