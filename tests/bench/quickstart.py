"""The quickstart over fresh seeds, and beside it what as many seconds of further supervised training give.

python -m tests.bench.quickstart --seeds 11 12 13

The control goes on from the run's own base model for the wall time that the run spent in GRPO steps, with the schedule
of the base (warm-up, then linear decay to 0, its length fitted to the time) on demonstrations that the base never saw.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rlpost.clock import OUTSIDE_STEP
from tests.bench import runs

RECIPE = "recipes/quickstart.yaml"
FRESH = 1000
"""Added to the seed of the demonstrations for the control."""


def main() -> None:
    """Run every seed, print a table, write `quickstart.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quickstart"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every command")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        if folder.exists():
            parser.error(f"{folder} must not exist, so that the base is made anew: remove it, or choose another --out")
        results.append(measure(folder, [*options.overrides, f"seed={seed}", f"run_dir={folder}"]))
        (options.out / "quickstart.json").write_text(json.dumps(results, indent=2) + "\n")
        print(table(results), flush=True)


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One seed: base, GRPO, and the control."""
    started = time.monotonic()
    runs.rlpost("train", RECIPE, [*overrides, "name=grpo"])
    seconds = time.monotonic() - started
    summary = json.loads((folder / "grpo" / "summary.json").read_text())
    grpo_s = sum(spent for phase, spent in summary["phase_s"].items() if phase not in OUTSIDE_STEP)
    model, control_s, control_steps = train_control(folder, overrides, summary["recipe"]["sft"], grpo_s)
    return {
        "seed": summary["seed"],
        "command_s": round(seconds, 1),
        "grpo_s": round(grpo_s, 1),
        "phase_s": summary["phase_s"],
        "overhead_frac": summary["overhead_frac"],
        "base": summary["eval"]["before"],
        "grpo": summary["eval"]["after"],
        "control_s": round(control_s, 1),
        "control_steps": control_steps,
        "control": evaluate(overrides, model),
        "machine": summary["machine"],
        "versions": summary["versions"],
        "git_commit": summary["git_commit"],
    }


def train_control(folder: Path, overrides: list[str], sft: dict[str, Any], seconds: float) -> tuple[Path, float, int]:
    """The model after as many seconds of further supervised training, the seconds it took, and its steps."""
    [base] = folder.glob("models/sft-*")
    first, last = log_ends(base)
    pace_s = (last["unix_s"] - first["unix_s"]) / (last["step"] - first["step"])
    demonstrations = sft["tasks"]["config"]
    output = runs.rlpost(
        "sft",
        RECIPE,
        [
            *overrides,
            *other_model(base),
            f"sft.steps={int(seconds / pace_s)}",
            f"sft.max_seconds={seconds}",
            f"sft.tasks.config.seed={demonstrations['seed'] + FRESH}",
            f"sft.tasks.config.size={3 * demonstrations['size']}",
        ],
    )
    [line] = [line for line in output.splitlines() if line.startswith("model: ")]
    model = Path(line.removeprefix("model: "))
    first, last = log_ends(model)
    return model, last["unix_s"] - first["unix_s"], last["step"] + 1


def evaluate(overrides: list[str], model: Path) -> dict[str, float]:
    """Held-out figures of another model, by the same evaluation."""
    output = runs.rlpost("eval", RECIPE, [*overrides, *other_model(model), "sft=null"])
    return json.loads(output[output.index("{\n") :])


def other_model(folder: Path) -> list[str]:
    """The overrides that start from this folder."""
    return [f"model.path={folder}", "model.init=null"]


def log_ends(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """First and last line of a model's training log."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0]), json.loads(lines[-1])


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown; pass@1 is over all held-out problems, gains are in points."""
    phases = list(dict.fromkeys(phase for result in results for phase in result["phase_s"]))
    header = ["seed", "base", "GRPO", "gain", "SFT as long", "gain", "command s", *(f"{p} s" for p in phases)]
    header.append("overhead")
    lines = [header, ["---"] * len(header)]
    for result in results:
        base, grpo, control = (result[which]["pass@1"] for which in ("base", "grpo", "control"))
        lines.append(
            [
                str(result["seed"]),
                f"{base:.3f}",
                f"{grpo:.3f}",
                f"{100 * (grpo - base):+.1f}",
                f"{control:.3f}",
                f"{100 * (control - base):+.1f}",
                f"{result['command_s']:.0f}",
                *(f"{result['phase_s'].get(phase, 0.0):.1f}" for phase in phases),
                f"{result['overhead_frac']:.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
