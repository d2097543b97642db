"""What a person sees while a run goes: one live display on a terminal, one compact line a step anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from rlpost.summary import WORK

if TYPE_CHECKING:
    from types import TracebackType

    from rlpost.recipe import Recipe
    from rlpost.world import World

FIGURES = {
    "reward/mean": ("reward", "{:.3f}"),
    "reward/solved_frac": ("solved", "{:.1%}"),
    "policy/entropy": ("entropy", "{:.3f}"),
    "optim/grad_norm": ("grad", "{:.3g}"),
    "rollouts/length_mean": ("length", "{:.0f}"),
}
"""Metric -> its short label and format, in the order shown."""


class Progress:
    """Shows the figures that matter and the time left; ranks other than the main one are silent."""

    def __init__(
        self, recipe: Recipe, world: World, total_steps: int, start: int = 0, console: Console | None = None
    ) -> None:
        self.console = console or Console(quiet=not world.is_main, highlight=False)
        self.total_steps = total_steps
        self._start = start
        self._every = max(1, (total_steps - start) // 100)
        self._began = time.monotonic()
        self._figures = Text()
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            expand=True,
        )
        self._task: TaskID = self._bar.add_task(recipe.name or "run", total=total_steps, completed=start, left="")
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(Group(self._bar, self._figures), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the figures of 0-based `step`, which has just ended."""
        done = step + 1
        left_s = (time.monotonic() - self._began) / max(done - self._start, 1) * (self.total_steps - done)
        line = step_line(metrics)
        if self._live is not None:
            self._figures.plain = line
            self._bar.update(self._task, completed=done, left=f"{duration(left_s)} left")
        elif done % self._every == 0 or done in (self._start + 1, self.total_steps):
            self.message(f"step {done}/{self.total_steps}  {line}  left {duration(left_s)}")

    def message(self, text: str | Text) -> None:
        """Say something once, above the display."""
        # Text: no markup in what a model or a path may contain. Soft wrap: a log line stays one line.
        self.console.print(Text(text) if isinstance(text, str) else text, soft_wrap=True)

    def final(self, summary: Mapping[str, Any]) -> None:
        """Show the run's result: evaluation before and after, and where the time went."""
        if any(summary["eval"].values()):
            self.console.print(eval_table(summary["eval"]))
        self.console.print(time_table(summary))


def step_line(metrics: Mapping[str, float]) -> str:
    """One step's figures on one line; what was not measured is left out.

    >>> step_line({"reward/mean": 0.5, "time/step_s": 3.0, "time/generate_s": 2.0, "time/train_s": 0.75})
    'reward 0.500  3.0 s (generate 67%, train 25%)'
    """
    shown = [f"{label} {form.format(metrics[name])}" for name, (label, form) in FIGURES.items() if name in metrics]
    step_s = metrics.get("time/step_s", 0.0)
    if step_s:
        shares = {phase: metrics.get(f"time/{phase}_s", 0.0) / step_s for phase in WORK}
        split = ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items() if share >= 0.005)
        shown.append(f"{step_s:.1f} s ({split})")
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they can be said.

    >>> duration(7), duration(153), duration(7384)
    ('0:07', '2:33', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def eval_table(evaluation: Mapping[str, Mapping[str, float | None] | None]) -> Table:
    """Held-out figures before and after, side by side."""
    before, after = evaluation["before"] or {}, evaluation["after"] or {}
    table = Table("held out", title="evaluation")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right")
    for name in {**before, **after}:
        a, b = before.get(name), after.get(name)
        change = f"{b - a:+.3f}" if a is not None and b is not None else ""
        table.add_row(Text(name), *("-" if x is None else f"{x:.3f}" for x in (a, b)), change)
    return table


def time_table(summary: Mapping[str, Any]) -> Table:
    """Seconds by phase, with each phase's share of the steps and the most memory in use in it."""
    memory = summary["memory"] or {"of": None, "peak_gib": {}}
    table = Table("phase", title=f"{summary['steps']} steps, {duration(summary['wall_s'])} in all")
    for head in ("time", "share of steps", *(["peak GiB"] if memory["of"] else [])):
        table.add_column(head, justify="right")
    for phase, seconds in sorted(summary["phase_s"].items(), key=lambda item: -item[1]):
        share = summary["phase_frac"].get(phase)
        peak = memory["peak_gib"].get(phase)
        cells = "" if share is None else f"{share:.1%}", *([] if peak is None else [f"{peak:.2f}"])
        table.add_row(Text(phase), f"{seconds:.1f} s", *cells)
    table.add_section()
    table.add_row("overhead of a step", "", f"{summary['overhead_frac']:.1%}")
    if memory["of"]:
        table.caption = f"peak: {memory['of']}"
    return table
