"""Synthesis on the testbed: what each filter leaves by ground truth, and what the problems are worth in training.

    python -m tests.bench.synthesis --seeds 71 72 73 74 75

For each seed: `recipes/scalediff_testbed.yaml` makes base, generator and problems; the teacher solves the original
tasks too. From the one base follow supervised runs on as many documents (of the original tasks, a random subset, the
difficult subset, that and the synthetic ones), and GRPO for as many steps without and with online synthesis.
Held out: sums of 3 to 8 terms, exact chains. Runs go two at a time with one thread each. What is in `--out` already is
not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlpost.synth.rows import consensus
from rlpost.synth.store import read
from rlpost.testbed import correct_chain
from tests.bench import runs
from tests.bench.curricula import interval

RECIPE = "recipes/scalediff_testbed.yaml"
PROBLEM = re.compile(r"\d([+-]\d)+=")
DIFFICULT = 0.85
"""As `synth.identify.at_least` of the recipe: 1 - pass rate of the base."""
ORIGINALS = [
    "synth.identify={use: 'tests.bench.synthesis:everything'}",
    "synth.train={use: 'tests.bench.synthesis:nothing'}",
    "synth.screen=[]",
    "synth.filters=[{use: solution_rules}, {use: agreement, at_least: 0.6}]",
]
"""The teacher on the original tasks, by the pipeline's own stages."""
SFT = ["sft.batch_size=32", "sft.lr=3e-4", "sft.warmup_steps=10", "sft.decay_frac=0.6", "model.init=null"]
QUIET = ["save_every=0", "logging.tensorboard=false", "logging.samples_per_step=2"]
ARMS = ("original", "random", "difficult", "difficult + synthetic")
ONLINE = "synth.online={every: 10, seeds: 64, number: 192, most: 64, below: 0.6, budget: 400}"
RL_ARMS: dict[str, list[str]] = {"grpo": ["synth=null"], "grpo, online synthesis": [ONLINE]}

uses_model = False


def main() -> None:
    """Run what is not there yet, print tables, write `synthesis.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[71, 72, 73, 74, 75])
    parser.add_argument("--originals", type=int, default=3000, help="tasks that the teacher solves, at most all")
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help="of GRPO")
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-synthesis"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every command")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = list(pool.map(lambda seed: one_seed(seed, options), options.seeds))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "synthesis.json").write_text(json.dumps(results, indent=2) + "\n")
    told = f"{truth_table(results)}\n\n{arms_table(results)}\n\n{levels(results)}\n"
    (options.out / "synthesis.md").write_text(told)
    print(told)


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one seed, one run after the other."""
    done = options.out / f"seed-{seed}.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    shared = [*options.overrides, f"seed={seed}", f"run_dir={options.out}"]
    made = options.out / f"synth-{seed}"
    runs.rlpost("synth", RECIPE, [*shared, f"name={made.name}"], threads=1)
    taken = f"synth.sample={{use: 'tests.bench.synthesis:originals', number: {options.originals}}}"
    runs.rlpost("synth", RECIPE, [*shared, f"name=originals-{seed}", *ORIGINALS, taken], threads=1)
    base = runs.base_model(RECIPE, options.out, [*options.overrides, f"seed={seed}"], threads=1)
    result = {"seed": seed, "truth": truth(made / "synth", options.out / f"truth-{seed}.jsonl", base, shared)}
    sets = data_sets(made / "synth", options.out / f"originals-{seed}" / "synth", seed)
    result["sizes"] = {name: len(rows) for name, rows in sets.items()}
    result["before"] = evaluated(base, shared)
    result["after"] = {name: supervised(name, rows, base, options, shared) for name, rows in sets.items()}
    for name, overrides in RL_ARMS.items():
        result["after"][name] = reinforced(name, [*shared, *overrides], made, options)
    done.write_text(json.dumps(result, indent=2) + "\n")
    return result


def everything(rows: Iterator[dict[str, Any]], bench: Any) -> Iterator[dict[str, Any]]:
    """Stage `identify`: every task is taken."""
    return ({**row, "score": 1.0, "difficult": True} for row in rows)


def nothing(rows: Sequence[dict[str, Any]], bench: Any) -> dict[str, Any]:
    """Stage `train`: no generator."""
    return {"model": None, "problems": len(rows)}


def originals(rows: Iterator[dict[str, Any]], bench: Any, *, number: int) -> Iterator[dict[str, Any]]:
    """Stage `sample`: the original tasks instead of new ones."""
    tasks = read(bench.folder / "identify")
    for row, task in zip(rows, tasks, strict=False):
        yield {**row, "prompt": task["prompt"], "finish": "stop"}


def truth(folder: Path, file: Path, base: Path, shared: Sequence[str]) -> list[dict[str, Any]]:
    """What is true of what each stage leaves: well posed, answer right, difficult for the base by the true answer."""
    sampled = {row["id"]: row["prompt"] for row in read(folder / "sample")}
    well = {id: prompt for id, prompt in sampled.items() if PROBLEM.fullmatch(prompt)}
    score = pass_rates(well, file, base, shared)
    answers = {row["id"]: consensus(row["solutions"])[0] for row in read(folder / "distil")}
    rows = [{"stage": "seeds", **seeds_truth(folder)}]
    left = list(sampled)
    for stage in json.loads((folder / "funnel.json").read_text())[1:]:
        name = stage["stage"]
        if name.startswith(("screen", "filters")):
            gone = {row["id"] for row in read(folder / name) if row["reason"]}
            left = [id for id in left if id not in gone]
        posed = [id for id in left if id in well]
        judged = [id for id in left if id in answers and name != "sample" and not name.startswith("screen")]
        right = [id for id in judged if id in well and answers[id] == correct_chain(well[id])]
        rows.append(
            {
                "stage": name,
                "problems": len(left),
                "well_posed": share(len(posed), len(left)),
                "right": share(len(right), len(judged)),
                "difficult": share(sum(score[id] >= DIFFICULT for id in posed), len(posed)),
                "base_pass_rate": 1 - statistics.mean(score[id] for id in posed) if posed else None,
            }
        )
    return rows


def seeds_truth(folder: Path) -> dict[str, Any]:
    """The same of the seed set."""
    scores = [row["score"] for row in read(folder / "identify") if row["score"] is not None]
    difficult = share(sum(score >= DIFFICULT for score in scores), len(scores))
    mean = 1 - statistics.mean(scores)
    return {"problems": len(scores), "well_posed": 1.0, "right": 1.0, "difficult": difficult, "base_pass_rate": mean}


def pass_rates(problems: dict[str, str], file: Path, base: Path, shared: Sequence[str]) -> dict[str, float]:
    """1 - pass rate of the base on each different problem, against the true chain, by `rlpost difficulty`."""
    keys = {prompt: id for id, prompt in problems.items()}
    rows = [{"key": id, "prompt": prompt, "chain": correct_chain(prompt)} for prompt, id in keys.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = file.with_name(file.stem + "-difficulty.jsonl")
    source = ["tasks.eval=null", f"tasks.train={{path: {file}, key: key, answer: chain}}", "evaluation.by=null"]
    model = [f"model.path={base}", "model.init=null", "sft=null", "synth=null", "sampling.max_new_tokens=64"]
    runs.rlpost("difficulty", RECIPE, [*shared, *source, *model, "--n", "8", "--out", str(out)], threads=1)
    found = {row["key"]: row["difficulty"] for row in map(json.loads, out.read_text().splitlines())}
    return {id: found[keys[prompt]] for id, prompt in problems.items()}


def data_sets(made: Path, original: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each supervised arm; a subset is as large as the difficult one."""
    whole = [json.loads(line) for line in (original / "problems.jsonl").read_text().splitlines()]
    hard = {row["prompt"] for row in read(made / "identify") if row["difficult"]}
    difficult = [row for row in whole if row["prompt"] in hard]
    synthetic = [json.loads(line) for line in (made / "problems.jsonl").read_text().splitlines()]
    subset = random.Random(seed).sample(whole, min(len(difficult), len(whole)))
    return dict(zip(ARMS, (whole, subset, difficult, [*difficult, *synthetic]), strict=True))


def supervised(
    name: str, rows: Sequence[dict[str, Any]], base: Path, options: argparse.Namespace, shared: Sequence[str]
) -> dict[str, float]:
    """Held-out figures after as many supervised steps on these rows as on any others."""
    seed = next(one for one in shared if one.startswith("seed="))
    file = options.out / f"{slug(name)}-{seed.removeprefix('seed=')}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"sft.tasks={{path: {file}, key: key, solution: solution}}", f"sft.steps={options.sft_steps}"]
    output = runs.rlpost("sft", RECIPE, [*shared, *SFT, f"model.path={base}", *data, "synth=null"], threads=1)
    [line] = [line for line in output.splitlines() if line.startswith("model: ")]
    return evaluated(Path(line.removeprefix("model: ")), shared)


def evaluated(model: Path, shared: Sequence[str]) -> dict[str, float]:
    """Held-out figures of a model folder."""
    alone = [f"model.path={model}", "model.init=null", "sft=null", "synth=null"]
    output = runs.rlpost("eval", RECIPE, [*shared, *alone], threads=1)
    return dict(json.loads(output[output.index("{") :]))


def reinforced(name: str, overrides: Sequence[str], made: Path, options: argparse.Namespace) -> dict[str, float]:
    """Held-out figures after GRPO; online rounds begin with the generator of the seed's synthesis."""
    folder = options.out / f"{slug(name)}-{made.name.removeprefix('synth-')}"
    if not (folder / "summary.json").exists():
        if not (folder / "synth").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "synth").symlink_to((made / "synth").resolve())
        mine = [f"name={folder.name}", f"steps={options.steps}", "curriculum={use: learnable}", "evaluation.every=10"]
        runs.rlpost("train", RECIPE, [*overrides, *mine, *QUIET], threads=1)
    return dict(json.loads((folder / "summary.json").read_text())["eval"]["after"])


def slug(name: str) -> str:
    """A name for a file.

    >>> slug("difficult + synthetic")
    'difficult-synthetic'
    """
    return re.sub(r"\W+", "-", name)


def share(part: int, whole: int) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None


def truth_table(results: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, stage by stage."""
    lines = [
        "| after | problems | well posed | answer right | difficult | base's pass rate |",
        "|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(results[0]["truth"]):
        cells = [mean_of([one["truth"][i][key] for one in results]) for key in ("well_posed", "right", "difficult")]
        rate = mean_of([one["truth"][i]["base_pass_rate"] for one in results])
        count = statistics.mean(one["truth"][i]["problems"] for one in results)
        lines.append(f"| {row['stage']} | {count:.0f} | {' | '.join(cells)} | {rate} |")
    return "\n".join(lines)


def mean_of(values: Sequence[float | None]) -> str:
    """A mean of what is known."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else ""


def arms_table(results: Sequence[dict[str, Any]]) -> str:
    """Held-out pass@1 of each arm by seed; supervised arms against `original`, GRPO against GRPO alone."""
    lines = [
        "| arm | problems | pass@1 after, by seed | gain | against the first of its kind |",
        "|---|---|---|---|---|",
    ]
    for arm in results[0]["after"]:
        first = "grpo" if arm in RL_ARMS else ARMS[0]
        after = [one["after"][arm]["pass@1"] for one in results]
        gains = [100 * (value - one["before"]["pass@1"]) for value, one in zip(after, results, strict=True)]
        pairs = [100 * (value - one["after"][first]["pass@1"]) for value, one in zip(after, results, strict=True)]
        size = mean_of([one["sizes"].get(arm) for one in results]).partition(".")[0]
        told = " ".join(f"{value:.3f}" for value in after)
        lines.append(f"| {arm} | {size} | {told} | {interval(gains)} | {interval(pairs)} |")
    return "\n".join(lines)


def levels(results: Sequence[dict[str, Any]]) -> str:
    """Held-out pass@1 by number of terms, mean over seeds."""
    names = sorted({key for one in results for key in one["before"] if key.startswith("pass@1/")})
    lines = [f"| | {' | '.join(name.removeprefix('pass@1/') for name in names)} |", f"|{'---|' * (len(names) + 1)}"]
    cells: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {"base": lambda one: one["before"]}
    cells |= {arm: lambda one, arm=arm: one["after"][arm] for arm in results[0]["after"]}
    for label, of in cells.items():
        lines.append(f"| {label} | {' | '.join(mean_of([of(one)[name] for one in results]) for name in names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
