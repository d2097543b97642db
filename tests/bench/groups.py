"""What a rollout costs at group sizes 16 to 512, with as many rollouts in every step and prompts of 256 tokens; and the
trainer's memory while groups grow.

python -m tests.bench.groups
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.against_trl import SMALL, fresh

SIZES = (16, 64, 128, 256, 512)
ROLLOUTS = 512
GROWING = (16, 128, 512)
"""Group sizes at which memory is measured, with two prompts a step."""
PROMPT, ANSWER = 256, 64


def main() -> None:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-groups"))
    options = parser.parse_args()
    result = measure(options.out, options.steps)
    (options.out / "groups.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def measure(out: Path, steps: int) -> dict[str, Any]:
    """Milliseconds a rollout by phase, and peak GiB by phase, by group size."""
    model = [f"model.path={runs.base_model(SMALL, out)}", "model.init=null", "sft=null"]
    texts = ["tasks.train.config.kind=long", f"tasks.train.config.prompt_tokens={PROMPT}"]
    work = [*model, *texts, f"sampling.max_new_tokens={ANSWER}", f"steps={steps}"]
    costs = {}
    for size in SIZES:
        shape = [f"sampling.group_size={size}", f"prompts_per_step={ROLLOUTS // size}"]
        found = runs.train(SMALL, fresh(out / f"groups-{size}"), [*work, *shape])
        phases = {phase: runs.median(found, f"time/{phase}_s") for phase in ("generate", "train", "step")}
        costs[str(size)] = {phase: 1000 * seconds / ROLLOUTS for phase, seconds in phases.items()}
    memory = {}
    for size in GROWING:
        wide = ["sampling.group_size=16", "prompts_per_step=2", "batch.micro_tokens=4096"]
        wide += [f"explore=[{{use: broaden, width: {size}, chunk: 64}}]"] if size > 16 else []
        found = runs.train(SMALL, fresh(out / f"memory-{size}"), [*work, *wide, "steps=3"])
        memory[str(size)] = {
            phase: max(step[f"memory/peak_gib/{phase}"] for step in found) for phase in ("generate", "train")
        }
    return {"costs": costs, "memory": memory}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| group size | ms a rollout: generation | against 16 | training | all of the step |",
        "|---|---|---|---|---|",
    ]
    first = result["costs"][str(SIZES[0])]["generate"]
    for size, one in result["costs"].items():
        share = one["generate"] / first
        lines.append(f"| {size} | {one['generate']:.2f} | {share:.2f} | {one['train']:.2f} | {one['step']:.2f} |")
    lines += [
        "",
        f"{ROLLOUTS} rollouts a step, prompts of {PROMPT} tokens, answers of {ANSWER}. Target at 512: 0.6 of 16.",
    ]
    lines += ["", "| rollouts of each of 2 prompts | peak GiB in generation | in training |", "|---|---|---|"]
    lines += [f"| {size} | {one['generate']:.2f} | {one['train']:.2f} |" for size, one in result["memory"].items()]
    return "\n".join([*lines, "", "Of the whole process, at 4,096 positions a micro-batch; asked for in chunks of 64."])


if __name__ == "__main__":
    main()
