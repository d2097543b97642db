"""`rlpost simulate pipeline`: tables, `pipeline.json` and `pipeline.png`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rlpost.errors import RunError
from rlpost.simulate.cluster import Cluster, load
from rlpost.simulate.measured import described
from rlpost.simulate.pipeline import Result
from rlpost.simulate.pipeline_figures import Figures, figures, simulated
from rlpost.simulate.pipeline_search import Found, Trial, search
from rlpost.simulate.rates import rates, written_at_once

SHOWN = 12
"""Ways of a search in its table."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart."""


def run(options: argparse.Namespace) -> None:
    """Simulate or search, print, and write the files."""
    paths = [word for word in options.words if "=" not in word]
    if len(paths) > 1:
        raise RunError(f"simulate pipeline takes one description and key=value (got {', '.join(paths)})")
    under = described(options.from_run) if options.from_run else None
    cluster = load(Path(paths[0]) if paths else None, [word for word in options.words if "=" in word], under=under)
    console = Console(quiet=options.json)
    if options.search:
        with console.status("") as status:
            found = search(cluster, options.group_sizes, status.update)
        whole, tables, picture = as_json_found(found), search_tables(found), plot_search(found)
        said = f"advised, the smallest k within 2 % of the best: {told(found.advised)}\n"
    else:
        with console.status("simulating"):
            result = simulated(cluster)
        whole, tables, picture = as_json(result), [figures_table(figures(result))], plot_steps(result)
        said = ""
    options.out.mkdir(parents=True, exist_ok=True)
    files = options.out / "pipeline.json", options.out / "pipeline.png"
    files[0].write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    picture.savefig(files[1], dpi=110)
    if options.json:
        print(json.dumps(whole, indent=2))
        return
    console.print(speeds(cluster), highlight=False, soft_wrap=True)
    for table in tables:
        console.print(table)
    console.print(f"{said}written: {files[0]}, {files[1]}", highlight=False, soft_wrap=True)


def speeds(cluster: Cluster) -> str:
    """What the simulation counts on, given or guessed."""
    found, size = rates(cluster), cluster.replicas.tensor_parallel
    first, last = 1e3 * found.decode_s[1], 1e3 * found.decode_s[-1]
    lines = [
        f"{cluster.num_replicas} replicas of {size} GPU{'s' * (size > 1)}: a decode step of 1 answer {first:.3g} ms, "
        f"of {found.slots} {last:.3g} ms ({1e3 * found.slots / last:,.0f} tokens/s)",
        f"a replica reads {found.prefill_rate:,.0f} tokens/s; weights arrive in {found.sync_s:.3g} s",
        f"{cluster.training} GPUs train: {found.train_rate:,.0f} tokens/s and {cluster.train.fixed_s:.3g} s a step",
        f"{cluster.prompts_per_step} prompts x {cluster.group_size} answers a step; lengths: {cluster.lengths.kind}; "
        f"so far of one that is being written: {written_at_once(cluster.lengths):,.0f} tokens on average",
    ]
    if cluster.first_come and cluster.late == "wait" and cluster.waves_ahead == cluster.max_staleness:
        lines.append("first_come changes nothing here: what is due fills every step; give ahead < max_staleness")
    return "\n".join(lines)


def rows_of(one: Figures) -> list[tuple[str, str]]:
    """Figures with their names in words."""
    return [
        ("step", f"{one.step_s:.2f} s"),
        ("  the trainer waits for rollouts", f"{one.wait_s:.2f} s"),
        ("  it trains", f"{one.train_s:.2f} s"),
        ("  weights are brought", f"{one.sync_s:.2f} s"),
        ("trained", f"{one.trained_per_s:,.0f} tokens/s, {one.trained_per_gpu_s:,.1f} a GPU"),
        ("generated", f"{one.generated_per_s:,.0f} tokens/s"),
        ("the trainer trains", f"{one.trainer_frac:.1%} of the time"),
        ("a replica generates", f"{one.generator_frac:.1%} of the time, {one.slots_frac:.1%} of its slots taken"),
        ("staleness of a token", f"{one.stale_mean:.2f} steps, at most {one.stale_max}"),
        ("read again at new weights", f"{one.read_again_frac:.1%} of the tokens generated"),
        ("lost with replicas", f"{one.lost_frac:.1%}, {one.deaths} deaths"),
        ("thrown away as too stale", f"{one.dropped_frac:.1%}"),
        ("length bias", f"{one.length_bias:+.1%} tokens in a trained answer"),
        ("an answer takes", f"{one.answer_s:.1f} s"),
    ]


def figures_table(one: Figures) -> Table:
    """A row a figure."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in rows_of(one):
        table.add_row(name, value)
    return table


def search_tables(found: Found) -> list[Table]:
    """The best ways, and the best of each bound on staleness and placement."""
    leaders: dict[tuple[str, int], Trial] = {}
    for trial in found.trials:
        leaders.setdefault((trial.cluster.placement, trial.cluster.max_staleness), trial)
    ways = {"the best ways; all: colocated": found.trials[:SHOWN], "the best of each kind": list(leaders.values())}
    return [trials_table(title, trials) for title, trials in ways.items()]


def told(trial: Trial) -> str:
    """A way in words."""
    one = trial.cluster
    split = f"{one.generating} GPUs generate and {one.training} train" if one.placement == "separate" else "colocated"
    return f"{split}, max_staleness {one.max_staleness}, groups of {one.group_size}"


def trials_table(title: str, trials: list[Trial]) -> Table:
    """A row a way: the GPUs that generate, and what came of it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    for heading in ("generate", "k", "group", "step s", "wait s", "tokens/s", "trainer", "replica", "stale", "reread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials:
        one, cluster = trial.figures, trial.cluster
        table.add_row(
            "all" if cluster.placement == "colocated" else str(cluster.generating),
            str(cluster.max_staleness),
            str(cluster.group_size),
            f"{one.step_s:.1f}",
            f"{one.wait_s:.1f}",
            f"{one.trained_per_s:,.0f}",
            f"{one.trainer_frac:.0%}",
            f"{one.generator_frac:.0%}",
            f"{one.stale_mean:.2f}",
            f"{one.read_again_frac:.0%}",
        )
    return table


def as_json(result: Result) -> dict[str, Any]:
    """Description, figures and steps."""
    steps = [asdict(step) for step in result.steps]
    return {"cluster": asdict(result.cluster), "figures": asdict(figures(result)), "steps": steps}


def as_json_found(found: Found) -> dict[str, Any]:
    """Every way that was tried, and the one that is advised."""
    trials = [{"cluster": asdict(trial.cluster), "figures": asdict(trial.figures)} for trial in found.trials]
    return {"advised": trials[found.trials.index(found.advised)], "trials": trials}


def plot_steps(result: Result) -> Any:
    """Where the seconds of each step went; how busy both sides were; how stale tokens were."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 7), layout="constrained")
    seconds, busy, stale = picture.subplots(3, 1, sharex=True)
    steps, places = result.steps, range(len(result.steps))
    parts = {
        "weights are brought": [step.synced - step.begin for step in steps],
        "trainer waits": [step.begun - step.synced for step in steps],
        "trains": [step.train_s for step in steps],
    }
    bottom = [0.0] * len(steps)
    for (name, height), color in zip(parts.items(), COLORS, strict=False):
        seconds.bar(places, height, bottom=bottom, label=name, color=color, width=0.9)
        bottom = [low + high for low, high in zip(bottom, height, strict=True)]
    long = [max(step.end - step.begin, 1e-9) for step in steps]
    replicas = result.cluster.num_replicas
    busy.plot(places, [step.train_s / s for step, s in zip(steps, long, strict=True)], label="trainer", color=COLORS[2])
    shares = [step.busy_s / (s * replicas) for step, s in zip(steps, long, strict=True)]
    busy.plot(places, shares, label="replicas", color=COLORS[3])
    stale.plot(places, [step.stale_mean for step in steps], label="mean", color=COLORS[0])
    stale.plot(places, [step.oldest for step in steps], label="oldest", color=COLORS[1], linestyle=":")
    seconds.set(ylabel="seconds of a step")
    busy.set(ylabel="share of the time", ylim=(-0.03, 1.03))
    stale.set(ylabel="staleness of tokens, steps", xlabel="step")
    for axis in (seconds, busy, stale):
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axis.grid(alpha=0.25)
    return picture


def plot_search(found: Found) -> Any:
    """Trained tokens a second over the split, a line a bound on staleness; what is colocated as a dashed line."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5), layout="constrained")
    axis = picture.subplots()
    sizes = [trial.cluster.group_size for trial in found.trials]
    size = max(set(sizes), key=sizes.count)
    every = [trial for trial in found.trials if trial.cluster.group_size == size]
    for place, k in enumerate(sorted({trial.cluster.max_staleness for trial in every})):
        own = [trial for trial in every if trial.cluster.max_staleness == k]
        line = sorted((one.cluster.generating, one.rate) for one in own if one.cluster.placement == "separate")
        color = COLORS[place % len(COLORS)]
        axis.plot([x for x, _ in line], [y for _, y in line], "o-", ms=4, color=color, label=f"k = {k}")
        for trial in own:
            if trial.cluster.placement == "colocated":
                axis.axhline(trial.rate, linestyle="--", linewidth=1, color=color, label=f"k = {k}, colocated")
    axis.set(xlabel=f"GPUs that generate, of {every[0].cluster.gpus}", ylabel="trained tokens/s", ylim=(0, None))
    axis.set_title(f"groups of {size}")
    axis.legend(frameon=False, fontsize="small", ncols=2)
    axis.grid(alpha=0.25)
    return picture
