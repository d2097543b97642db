"""What a rollout costs at group sizes 16 to 512, with as many rollouts each time and prompts of 256 tokens; and the
trainer's memory while groups grow.

    python -m tests.bench.groups

Generation is timed alone, in one engine for each way that vLLM may keep keys and values, sizes in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench import runs
from tests.bench.against_trl import SMALL, fresh

SIZES = (16, 64, 128, 256, 512)
ROLLOUTS = 512
GROWING = (16, 128, 512)
"""Group sizes at which memory is measured, with two prompts a step."""
PROMPT, ANSWER, ROUNDS = 256, 64, 5
WAYS = {"as it is": {}, "blocks of 128": {"block_size": 128}, "no prefix reuse": {"enable_prefix_caching": False}}
"""Arguments of vLLM: blocks of 128 tokens are its default on a CPU."""


def main() -> None:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-groups"))
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "OPTIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(seconds_of(options.child[0], json.loads(options.child[1]))))
        return
    result = measure(options.out)
    (options.out / "groups.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def work(model: Path | str) -> list[str]:
    """The overrides of the job: a model, prompts and answers of one length."""
    texts = ["tasks.train.config.kind=long", f"tasks.train.config.prompt_tokens={PROMPT}"]
    return [f"model.path={model}", "model.init=null", "sft=null", *texts, f"sampling.max_new_tokens={ANSWER}"]


def measure(out: Path) -> dict[str, Any]:
    """Milliseconds a rollout by size and way, and peak GiB by phase and size."""
    model = runs.base_model(SMALL, out)
    memory = {}
    for size in GROWING:
        wide = ["sampling.group_size=16", "prompts_per_step=2", "batch.micro_tokens=4096", "steps=3"]
        wide += [f"explore=[{{use: broaden, width: {size}, chunk: 64}}]"] if size > 16 else []
        steps = runs.train(SMALL, fresh(out / f"memory-{size}"), [*work(model), *wide])
        memory[str(size)] = {
            phase: max(step[f"memory/peak_gib/{phase}"] for step in steps) for phase in ("generate", "train")
        }
    costs = {}
    for way, options in WAYS.items():
        command = [sys.executable, "-m", "tests.bench.groups", "--child", str(model), json.dumps(options)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)
        found = json.loads(done.stdout.splitlines()[-1])
        costs[way] = {size: 1000 * statistics.median(times) / ROLLOUTS for size, times in found.items()}
    return {"costs": costs, "memory": memory}


def seconds_of(model: str, options: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of `ROLLOUTS` rollouts at each group size, in turn, after a round that is not counted."""
    from rlpost.__main__ import quiet
    from rlpost.check import load_and_check
    from rlpost.collect import collect
    from rlpost.run import make_engines, make_generator, make_renderer, training_sampling
    from rlpost.tasks import load_task_sets
    from rlpost.world import World

    quiet()
    recipe = load_and_check(SMALL, [*work(model), f"generator.options={json.dumps(options)}"])
    world, (tasks, _) = World().start(), load_task_sets(recipe)
    renderer = make_renderer(recipe, Path(model))
    sampling = training_sampling(recipe, tasks, renderer)
    engine, *_ = make_engines(recipe, Path(model), world)
    generator = make_generator(recipe, Path(model), renderer, tasks[0], engine)
    seconds: dict[str, list[float]] = {str(size): [] for size in SIZES}
    with generator.awake(engine, 0):
        for number in range(ROUNDS + 1):
            for size in SIZES:
                first = number * len(SIZES) * 32
                some = list(enumerate(tasks[: ROLLOUTS // size]))
                generator.llm.reset_prefix_cache()  # type: ignore[attr-defined]
                started = time.perf_counter()
                collect(generator, renderer, some, sampling, group_size=size, first_group=first, seed=number)
                seconds[str(size)].append(time.perf_counter() - started)
    generator.close()
    world.stop()
    return {size: times[1:] for size, times in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    ways = list(result["costs"])
    lines = [f"| group size | {' | '.join(f'ms a rollout, {way}' for way in ways)} |", f"|{'---|' * (len(ways) + 1)}"]
    for size in map(str, SIZES):
        cells = [f"{result['costs'][way][size]:.2f}" for way in ways]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    said = f"{ROLLOUTS} rollouts, prompts of {PROMPT} tokens, answers of {ANSWER}; medians of {ROUNDS}."
    lines += ["", said, "", "| rollouts of each of 2 prompts | peak GiB in generation | in training |", "|---|---|---|"]
    lines += [f"| {size} | {one['generate']:.2f} | {one['train']:.2f} |" for size, one in result["memory"].items()]
    return "\n".join([*lines, "", "Of the whole process, at 4,096 positions a micro-batch; asked for in chunks of 64."])


if __name__ == "__main__":
    main()
