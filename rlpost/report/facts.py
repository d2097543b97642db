"""The table at the top of a report: what a run reached, and what it took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlpost.history import History
from rlpost.progress import duration
from rlpost.report.columns import eval_interval, rounded, short
from rlpost.report.funnels import total

Fact = list[Any]
"""(what, value, remark), and an interval behind them where the value has one."""
TOTALS = {
    "total/flops/total": "FLOPs",
    "total/device_s": "device-seconds",
    "total/energy/gpu_j": "energy of GPUs, J",
    "total/energy/cpu_j": "energy of CPUs, J",
}
"""Cumulative figures -> what the table calls them."""


def facts(history: History) -> list[Fact]:
    """The rows."""
    return [*_reached(history), *_spent(history), *_where(history.summary or {})]


def _reached(history: History) -> Iterator[Fact]:
    evaluations = history.evaluations
    for label, found in (("first", evaluations[:1]), ("last", evaluations[1:][-1:])):
        for done, row in found:
            value, pair = short(row["eval/pass@1"], 4), rounded(eval_interval(row, "eval/pass@1"))
            yield [f"held-out pass@1, {label}", value, f"after {done} steps", pair]
    last = [row["reward/mean"] for row in history.steps[-5:] if row.get("reward/mean") is not None]
    if last:
        yield ["reward, newest steps", short(sum(last) / len(last), 4), f"mean of {len(last)}"]


def _spent(history: History) -> Iterator[Fact]:
    steps, summary = history.steps, history.summary or {}
    yield ["steps", len(steps), f"of {history.total_steps}"]
    if "wall_s" in summary:
        yield ["time", duration(summary["wall_s"]), "all phases"]
    elif steps:
        yield ["time in steps", duration(total(steps, "time/step_s")), ""]
    yield ["tokens generated", short(total(steps, "tokens/generated")), ""]
    for name, what in TOTALS.items():
        values = [row[name] for row in history.rows if row.get(name) is not None]
        if values:
            yield [what, short(values[-1], 4), ""]
    if summary.get("overhead_frac") is not None:
        yield ["overhead of a step", f"{summary['overhead_frac']:.1%}", "neither generation nor training"]
    memory = summary.get("memory") or {}
    if memory.get("peak_gib"):
        yield ["peak memory, GiB", short(max(memory["peak_gib"].values()), 4), str(memory.get("of") or "")]


def _where(summary: dict[str, Any]) -> Iterator[Fact]:
    machine, commit = summary.get("machine") or {}, summary.get("git_commit")
    if machine:
        gpus = machine.get("gpus") or []
        what = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine.get('cores')} cores, {machine.get('cpu')}"
        yield ["machine", what, ""]
    if commit:
        yield ["commit", str(commit)[:12], "with changes" if "dirty" in str(commit) else ""]
