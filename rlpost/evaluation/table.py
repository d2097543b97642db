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
    names = dict.fromkeys(name for one in sets.values() for name in one["figures"] if name not in LEFT_OUT)
    for name in sorted(names, key=lambda name: name in COUNTS):
        cells = [Text(cell(name, one)) for one in sets.values()]
        table.add_row(Text("pass@1 (mean@n)" if name == "pass@1" else name), *cells)
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
