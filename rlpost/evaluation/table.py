"""The figures of an evaluation for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlpost.evaluation.intervals import is_share

COUNTS = ("num_problems", "n", "unjudged", "drawn")
LEFT_OUT = ("loss", "concentration")


def print_table(sets: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """A column a data set, a row a figure, with its 95 % interval; on standard error, where it is in no one's way."""
    table = Table("figure", title="evaluation, 95 % over problems")
    for name in sets:
        table.add_column(Text(name), justify="right")
    every = dict.fromkeys(name for one in sets.values() for name in one["figures"])
    names = [name for name in every if name not in LEFT_OUT and not name.startswith("mean@")]
    for name in sorted(names, key=lambda name: name in COUNTS):
        cells = [Text(cell(name, one)) for one in sets.values()]
        table.add_row(Text("pass@1 (mean@n)" if name == "pass@1" else name), *cells)
    (console or Console(stderr=True)).print(table)


def print_differences(sets: Mapping[str, Mapping[str, Any]], other: str, console: Console | None = None) -> None:
    """What each figure is more, or less, than in another evaluation of the same problems."""
    table = Table("figure", title=f"less {other}, problem by problem, 95 %")
    for name in sets:
        table.add_column(Text(f"{name} ({sets[name]['against']['problems']} problems)"), justify="right")
    names = dict.fromkeys(name for one in sets.values() for name in one["against"]["difference"])
    for name in names:
        cells = [one["against"]["difference"].get(name) for one in sets.values()]
        digits = 3 if is_share(name) else 1
        said = ["-" if c is None else f"{c[0]:+.{digits}f} [{c[1]:+.{digits}f}, {c[2]:+.{digits}f}]" for c in cells]
        table.add_row(Text(name), *map(Text, said))
    (console or Console(stderr=True)).print(table)


def cell(name: str, one: Mapping[str, Any]) -> str:
    """A figure with its interval.

    >>> cell("pass@1", {"figures": {"pass@1": 0.25}, "intervals": {"pass@1": [0.2, 0.31]}})
    '0.250 [0.200, 0.310]'
    """
    value = one["figures"].get(name)
    if value is None:
        return "-"
    if name in COUNTS:
        return str(int(value))
    digits = 3 if is_share(name) else 1
    ends = one["intervals"].get(name)
    return f"{value:.{digits}f}" + (f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else "")
