"""A live view of a run in the terminal, from what it writes: of one that goes on, or of one that has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlpost.alarms import alarms_of
from rlpost.clock import OUTSIDE_STEP
from rlpost.history import History, read_history
from rlpost.progress import duration
from rlpost.report.columns import eval_interval

FIGURES = {
    "reward/mean": ("reward", "{:.3f}"),
    "reward/solved_frac": ("solved", "{:.1%}"),
    "rollouts/pass@1": ("pass@1, training", "{:.3f}"),
    "policy/entropy": ("entropy, nats", "{:.3g}"),
    "policy/kl_ref": ("KL to the reference", "{:.3g}"),
    "groups/spread_frac": ("groups with spread", "{:.1%}"),
    "rollouts/length_mean": ("length, tokens", "{:.0f}"),
    "rollouts/truncated_frac": ("truncated", "{:.1%}"),
    "optim/grad_norm": ("gradient norm", "{:.3g}"),
    "mismatch/k3": ("KL generator, trainer", "{:.2g}"),
    "noise/scale": ("noise scale, prompts", "{:.3g}"),
    "time/step_s": ("seconds a step", "{:.1f}"),
}
"""Metric -> its label and format, in the order shown."""
BARS = "▁▂▃▄▅▆▇█"
SILENT = 5
"""Usual steps without a line, after which the view says so."""


def watch_run(folder: Path, *, every_s: float, once: bool, console: Console | None = None) -> None:
    """Show the run, once or until it has finished or a person stops."""
    console = console or Console()
    history = read_history(folder)
    if once:
        console.print(view(history, width=console.width, now=time.time()))
        return
    with Live(view(history, width=console.width, now=time.time()), console=console, auto_refresh=False) as live:
        while history.summary is None:
            time.sleep(every_s)
            history = read_history(folder)
            live.update(view(history, width=console.width, now=time.time()), refresh=True)


def view(history: History, *, width: int, now: float) -> Group:
    """The whole picture."""
    parts: list[Any] = [Text(heading(history, now), style="bold")]
    if history.steps:
        parts += [figures_table(history, width), Text(phase_line(history), style="dim")]
    if history.evaluations:
        parts.append(evaluation_table(history))
    alarms = alarms_of(history.rows)
    for alarm in alarms:
        state = "" if alarm.active else " (it no longer holds)"
        body = Text(f"{alarm.said}{state} {alarm.advice}")
        style = "red" if alarm.active else "yellow"
        parts.append(Panel(body, title=Text(f"alarm at step {alarm.step + 1}: {alarm.title}"), border_style=style))
    if not alarms and history.steps:
        parts.append(Text("no alarm", style="green"))
    return Group(*parts)


def heading(history: History, now: float) -> str:
    """Name, state and the time left."""
    done = history.steps[-1]["step"] + 1 if history.steps else 0
    return f"{history.name}  step {done}/{history.total_steps}  {state(history, now)}"


def state(history: History, now: float) -> str:
    """What the run does, as far as its files say."""
    if history.summary is not None:
        return f"finished in {duration(history.summary.get('wall_s') or 0.0)}"
    if not history.rows:
        return "setting up: nothing logged yet"
    silence, usual = now - float(history.rows[-1].get("unix_s") or now), step_seconds(history)
    if usual is not None and silence > SILENT * usual + 30:
        return f"no news for {duration(silence)}: a step took {usual:.1f} s before; it may wait, evaluate or have ended"
    done = history.steps[-1]["step"] + 1 if history.steps else 0
    if not done:
        return "the first step is under way"
    if done >= history.total_steps:
        return "all steps are done; last evaluation or saving"
    return f"training, {duration((usual or 0.0) * (history.total_steps - done))} left"


def step_seconds(history: History) -> float | None:
    """The usual time between two steps' lines of late, evaluations and checkpoints in it; None before two steps."""
    stamps = [row["unix_s"] for row in history.steps[-21:] if "unix_s" in row]
    gaps = [later - earlier for earlier, later in pairwise(stamps) if later > earlier]
    return median(gaps) if gaps else None


def figures_table(history: History, width: int) -> Table:
    """The last value of each figure, and its course."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("least to most", justify="right", no_wrap=True, style="dim")
    table.add_column("course", no_wrap=True)
    room = max(8, min(60, width - 58))
    for name, (label, form) in FIGURES.items():
        values = [row[name] for row in history.steps if row.get(name) is not None]
        if values:
            ends = f"{form.format(min(values))} to {form.format(max(values))}"
            table.add_row(label, form.format(values[-1]), ends, sparkline(values, room))
    return table


def sparkline(values: Sequence[float], room: int) -> str:
    """A course in so many characters, each the mean of its part.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8), sparkline([1.0, 1.0], 8)
    ('▁▂▃▄▅▆▇█', '▁▁')
    """
    parts = min(room, len(values))
    cuts = [len(values) * i // parts for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[min(int((mean - low) / span * len(BARS)), len(BARS) - 1) if span else 0] for mean in means)


def phase_line(history: History) -> str:
    """Shares of the last step by phase."""
    row = history.steps[-1]
    whole = row.get("time/step_s") or 0.0
    inside = {
        name[len("time/") : -len("_s")]: value
        for name, value in row.items()
        if name.startswith("time/") and name != "time/step_s" and value
    }
    shares = {name: value / whole for name, value in inside.items() if whole and name not in OUTSIDE_STEP}
    large = sorted(((share, name) for name, share in shares.items() if share >= 0.01), reverse=True)
    return "last step: " + ", ".join(f"{name} {share:.0%}" for share, name in large)


def evaluation_table(history: History) -> Table:
    """The newest evaluations."""
    found = history.evaluations
    shown = [found[0], *found[1:][-5:]]
    names = [name for name in shown[-1][1] if name.startswith("eval/pass@") and "/" not in name[len("eval/") :]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("held out, after", no_wrap=True)
    for name in names:
        table.add_column(name[len("eval/") :], justify="right", no_wrap=True)
    table.add_column("95 % of pass@1", no_wrap=True, style="dim")
    for done, row in shown:
        pair = eval_interval(row, "eval/pass@1")
        cells = ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in names]
        table.add_row(f"{done} steps", *cells, "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}")
    return table
