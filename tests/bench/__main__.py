"""Every speed and memory benchmark of this folder, one after the other: tables into `results/performance.md`.

    python -m tests.bench [--only trl logp ...] [--out runs/bench]

Nothing else should run on the machine meanwhile. Each part's figures are kept in `--out` as JSON, and a part that is
there already is not measured again. Whatever stands below `## Reading` in the page is kept: it is written by hand.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlpost.devices import multiplies_bfloat16
from rlpost.errors import RunError
from rlpost.summary import git_commit, machine, versions
from tests.bench import against_trl, groups, logp, packing, plan, products, ranks, sync

PAGE = Path("results/performance.md")
READING = "## Reading"


@dataclass(frozen=True)
class Part:
    """One benchmark of the page."""

    title: str
    measure: Callable[[Path], dict[str, Any]]
    table: Callable[[dict[str, Any]], str | Table | list[Table]]


PARTS = {
    "trl": Part(
        "A step against TRL's GRPOTrainer",
        lambda out: against_trl.measure(list(against_trl.JOBS), out / "trl", out / "tools"),
        against_trl.table,
    ),
    "products": Part("Training against its matrix products", lambda out: products.measure(5), products.table),
    "logp": Part("Log-probs and entropy without the logits", lambda out: logp.measure(quick_cases()), logp.table),
    "packing": Part("Packing, shared prompts, balance", lambda out: packing.measure(), packing.tables),
    "sync": Part("Weight sync", lambda out: sync.measure(), sync.table),
    "groups": Part("Group sizes", lambda out: groups.measure(out / "groups"), groups.table),
    "ranks": Part("Weak scaling", lambda out: ranks.measure(out / "ranks", steps=6), ranks.table),
    "plan": Part("The plan against a run", lambda out: plan.measure(out / "trl"), plan.table),
}


def main() -> None:
    """Measure what is not there yet, and write the page; a part that fails leaves the others, and the exit says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not done(name, options.out)]
    write_page(options.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def done(name: str, out: Path) -> bool:
    """Measure one part, unless it is there; whether it is there now."""
    file = out / f"{name}.json"
    if file.exists():
        return True
    started = time.monotonic()
    try:
        figures = PARTS[name].measure(out)
    except (subprocess.CalledProcessError, RunError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return False
    whole = {
        "figures": figures,
        "minutes": (time.monotonic() - started) / 60,
        "machine": machine(),
        "versions": versions(),
        "commit": git_commit(),
    }
    file.write_text(json.dumps(whole, indent=2) + "\n")
    return True


def write_page(out: Path) -> None:
    """The page from every part that has been measured."""
    parts = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS if (out / f"{name}.json").exists()}
    if not parts:
        return
    reading = PAGE.read_text().partition(READING)[2] if PAGE.exists() else "\n"
    lines = [
        "# Performance",
        "",
        "`python -m tests.bench`, nothing else running; medians, in seconds unless it says otherwise.",
        "",
    ]
    for about in sorted({origin(part) for part in parts.values()}):
        lines += [about, ""]
    for name, part in parts.items():
        lines += [f"## {PARTS[name].title}", "", markdown(PARTS[name].table(part["figures"])), ""]
        lines += [f"{part['minutes']:.1f} minutes, commit `{(part['commit'] or 'unknown')[:12]}`.", ""]
    PAGE.write_text("\n".join([*lines, READING]) + reading)
    print(PAGE.read_text())


def quick_cases() -> dict[str, logp.Case]:
    """The cases of `logp` at the size of the target that this machine multiplies at a sensible speed."""
    return {name: logp.CASES[name] for name in ("float32", *(["bfloat16"] if multiplies_bfloat16() else []))}


def markdown(found: str | Table | list[Table]) -> str:
    """Tables made for a terminal, for a page."""
    if isinstance(found, str):
        return found
    page = Console(file=io.StringIO(), width=300, color_system=None)
    for table in found if isinstance(found, list) else [found]:
        title, caption = table.title, table.caption
        table.title, table.caption, table.box = None, None, box.MARKDOWN
        page.print(*([f"{title}:\n"] if title else []), table, *([caption] if caption else []), sep="\n")
    lines = page.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip()


def origin(part: dict[str, Any]) -> str:
    """Machine and versions in a sentence."""
    found, of = part["machine"], part["versions"]
    named = ", ".join(f"{name} {number}" for name, number in of.items())
    return f"Machine: {found['cores']} cores of {found['cpu']}, GPUs: {', '.join(found['gpus']) or 'none'}. {named}."


if __name__ == "__main__":
    main()
