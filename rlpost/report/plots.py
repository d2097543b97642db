"""The curves of some runs as PNG files, for papers and slides."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from rlpost.clock import OUTSIDE_STEP
from rlpost.errors import RunError
from rlpost.history import History, read_history
from rlpost.report.columns import choice_columns, eval_columns, step_columns
from rlpost.report.payload import distinct

FIGURES = {
    "eval/pass@1": "held-out pass@1",
    "reward/mean": "reward",
    "rollouts/pass@1": "pass@1 of training prompts",
    "policy/entropy": "entropy [nats]",
    "policy/kl_ref": "KL to the reference [nats]",
    "rollouts/length_mean": "answer length [tokens]",
    "rollouts/truncated_frac": "answers cut at the limit",
    "groups/spread_frac": "groups with differing rewards",
    "optim/grad_norm": "gradient norm",
    "mismatch/k3": "KL generator, trainer [nats]",
}
"""Figure -> its name on the axis; one panel each."""
WIDTH, HEIGHT = 4.2, 2.9


def write_plots(folders: Sequence[Path], to: Path) -> list[Path]:
    """Write `curves.png`, and `time.png` and `chosen.png` of each run that has them; the files."""
    from rlpost.history import lines_of

    mpl.use("Agg")
    histories = [read_history(folder) for folder in folders]
    names = distinct([history.name for history in histories])
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--png: {to} must be a folder that can be written ({error.strerror or error})") from error
    files = [saved(curves(histories, names), to / "curves.png")]
    for history, name in zip(histories, names, strict=True):
        stem = "" if len(histories) == 1 else "-" + (re.sub(r"[^\w.-]+", "_", name) or "run")
        columns = step_columns(history)
        if any(figure.startswith("time/") for figure in columns["figures"]):
            files.append(saved(phases(columns), to / f"time{stem}.png"))
        if choices := choice_columns(list(lines_of(history.folder / "chosen.jsonl"))):
            files.append(saved(chosen(choices), to / f"chosen{stem}.png"))
    return files


def saved(figure: Any, file: Path) -> Path:
    """Write a figure and let it go."""
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def curves(histories: Sequence[History], names: Sequence[str]) -> Any:
    """A panel a figure, a line a run, with the bands that the page has."""
    parts = [(eval_columns(history), step_columns(history)) for history in histories]
    shown = [name for name in FIGURES if any(name in part["figures"] for both in parts for part in both)]
    across = min(3, max(len(shown), 1))
    down = math.ceil(max(len(shown), 1) / across)
    figure, axes = plt.subplots(down, across, figsize=(WIDTH * across, HEIGHT * down), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        for i, (evals, steps) in enumerate(parts):
            part = evals if name.startswith("eval/") else steps
            if name in part["figures"]:
                draw(axis, part, name, label=names[i], ink=f"C{i % 10}")
        axis.set(ylabel=FIGURES[name], xlabel="step")
        tidy(axis)
    if shown and len(histories) > 1:
        axes.flat[0].legend(frameon=False, fontsize="small")
    return figure


def draw(axis: Any, part: dict[str, Any], name: str, *, label: str, ink: str) -> None:
    """One line, with its band."""
    x, y = part["x"]["step"], [math.nan if value is None else value for value in part["figures"][name]]
    axis.plot(
        x,
        y,
        color=ink,
        linewidth=1.4,
        label=label.replace("$", r"\$"),
        marker="o" if len(x) < 15 else None,
        markersize=3,
    )
    band = part["bands"].get(name)
    if band and len(x) > 1:
        low, high = ([math.nan if pair is None else pair[side] for pair in band] for side in (0, 1))
        axis.fill_between(x, low, high, color=ink, alpha=0.16, linewidth=0)


def phases(columns: dict[str, Any]) -> Any:
    """Where a step's time goes, as shares."""
    taken = {
        name[len("time/") : -len("_s")]: [value or 0.0 for value in values]
        for name, values in columns["figures"].items()
        if name.startswith("time/") and name != "time/step_s"
    }
    inside = sorted((name for name in taken if name not in OUTSIDE_STEP), key=lambda name: -sum(taken[name]))
    sums = [sum(taken[name][i] for name in inside) or 1.0 for i in range(len(columns["x"]["step"]))]
    figure, axis = plt.subplots(figsize=(WIDTH * 1.7, HEIGHT))
    shares = [[value / whole for value, whole in zip(taken[name], sums, strict=True)] for name in inside]
    axis.stackplot(columns["x"]["step"], *shares, labels=inside, alpha=0.85)
    axis.legend(frameon=False, fontsize="x-small", bbox_to_anchor=(1.0, 1.0), loc="upper left")
    axis.set(xlabel="step", ylabel="share of a step", ylim=(0, 1))
    return figure


def chosen(choices: dict[str, Any]) -> Any:
    """How often the chosen tasks were solved, over the steps."""
    figure, axis = plt.subplots(figsize=(WIDTH * 1.7, HEIGHT))
    shares = [[count / (sum(column) or 1) for count in column] for column in choices["bins"]]
    edges = [*choices["x"], choices["to"][-1] + 1]
    rows = list(range(len(shares[0]) + 1))
    mesh = axis.pcolormesh(edges, rows, [list(row) for row in zip(*shares, strict=True)], cmap="Blues", vmin=0)
    axis.set(xlabel="step", ylabel="success of the chosen tasks")
    axis.set_yticks([0.5, 1.5, 6.5, len(shares[0]) - 0.5], ["never", "<10 %", "50 %", "always"])
    figure.colorbar(mesh, ax=axis, label="share of the step's tasks")
    return figure


def tidy(axis: Any) -> None:
    """Less ink."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
