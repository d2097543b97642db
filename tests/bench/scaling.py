"""Is test loss a power law in compute on the quickstart's sums, and do small models predict a larger one?

python -m tests.bench.scaling --seeds 61 62 63 64 65

Four sizes from 0.16 M to 2.6 M parameters. The base of each size and seed is trained until its loss is as low as
`--base-loss`, and not for a number of steps; then GRPO, with held-out evaluations on the way. The three smaller sizes
predict the largest. Runs go two at a time with one thread each. A run that has ended is read, so that the command goes
on where it was cut off. Writes `scaling.json`, `scaling.md` and pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.scaling.fit import Estimate
from rlpost.scaling.fits import curvature, fit_curves, power_points, slopes
from rlpost.scaling.largest import SizePrediction, predict_largest
from rlpost.scaling.plots import figures
from rlpost.scaling.runs import RunCurve, read_runs
from tests.bench import runs
from tests.bench.curricula import HARDER, RECIPE


@dataclass(frozen=True)
class Size:
    """A width, with the learning rates that go with it: both fall as it grows."""

    hidden: int
    heads: int
    sft_lr: float
    lr: float
    most_steps: int
    """Of supervised training, where the loss does not get there."""

    @property
    def overrides(self) -> list[str]:
        """Of the recipe."""
        shape = [f"hidden_size={self.hidden}", f"intermediate_size={3 * self.hidden}", f"num_heads={self.heads}"]
        return [*(f"model.init.{one}" for one in shape), f"sft.lr={self.sft_lr}", f"engine.lr={self.lr}"]


SIZES = [
    Size(64, 2, 3e-3, 6e-4, 1600),
    Size(96, 3, 2e-3, 4e-4, 1200),
    Size(160, 5, 1.3e-3, 2.5e-4, 800),
    Size(256, 8, 1e-3, 1.5e-4, 600),
]
"""0.16, 0.36, 1.0 and 2.6 million parameters without embeddings, three layers, heads of 32.

With twice these rates some runs of each of the smaller three collapse."""
QUIET = ["save_every=0", "logging.tensorboard=false", "logging.samples_per_step=0", "sft.schedule=constant"]


def main() -> None:
    """Run what is not there yet, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[61, 62, 63, 64, 65])
    parser.add_argument("--sizes", type=int, nargs="+", default=[size.hidden for size in SIZES], help="hidden sizes")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--base-loss", type=float, default=0.25, help="of the bases, nats a token over 20 steps")
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--compute", choices=["total", "six_nt"], default="total")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-scaling"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every command")
    options = parser.parse_args()
    chosen = [size for size in SIZES if size.hidden in options.sizes]
    jobs = [(size, seed) for seed in options.seeds for size in reversed(chosen)]  # the longest first
    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = list(pool.map(lambda job: measure(*job, options), jobs))
    curves = read_runs([Path(result["folder"]) for result in results], options.compute)
    told = [by_size(results), *fitted(curves, options)]
    (options.out / "scaling.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "scaling.md").write_text("\n\n".join(told) + "\n")
    print("\n\n".join(told))


def measure(size: Size, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size on one seed."""
    folder = options.out / f"h{size.hidden}-{seed}"
    shared = [*HARDER, *QUIET, *size.overrides, f"run_dir={options.out}", f"seed={seed}"]
    shared += [f"sft.steps={size.most_steps}", f"sft.target_loss={options.base_loss}", "sft.tasks.config.size=40000"]
    shared += options.overrides
    base = runs.base_model(RECIPE, options.out, shared, threads=1)
    if not (folder / "summary.json").exists():
        mine = [f"name={folder.name}", f"steps={options.steps}", "evaluation.n=4", f"evaluation.every={options.every}"]
        runs.rlpost("train", RECIPE, [*shared, *mine], threads=1)
    summary = json.loads((folder / "summary.json").read_text())
    losses = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    return {
        "hidden": size.hidden,
        "seed": seed,
        "folder": str(folder),
        "base_steps": len(losses),
        "base_loss": statistics.fmean(line["policy/loss"] for line in losses[-20:]),
        "base_s": losses[-1]["unix_s"] - losses[0]["unix_s"],
        "before": summary["eval"]["before"],
        "after": summary["eval"]["after"],
        "wall_s": summary["wall_s"],
        "machine": summary["machine"],
        "versions": summary["versions"],
        "git_commit": summary["git_commit"],
    }


def by_size(results: Sequence[dict[str, Any]]) -> str:
    """How the bases came out, and what GRPO made of them."""
    lines = ["| hidden | base: steps | loss | pass@1, by seed | after GRPO, by seed | s |", f"|{'---|' * 6}"]
    for hidden in sorted({result["hidden"] for result in results}):
        mine = [result for result in results if result["hidden"] == hidden]
        rates = (" ".join(f"{one[when]['pass@1']:.3f}" for one in mine) for when in ("before", "after"))
        mean = {key: statistics.fmean(one[key] for one in mine) for key in ("base_steps", "base_loss", "wall_s")}
        cells = [f"{hidden}", f"{mean['base_steps']:.0f}", f"{mean['base_loss']:.3f}", *rates, f"{mean['wall_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fitted(curves: Sequence[RunCurve], options: argparse.Namespace) -> list[str]:
    """Every fit as a row, slopes by size, and the largest size from the smaller ones; pictures beside."""
    fits = fit_curves(curves)
    rows = ["| fit | parameters, 95 % intervals | R2 | held-out error | warnings |", f"|{'---|' * 5}"]
    for one in fits.fits:
        held = "-" if one.held_out is None else f"{one.held_out.error:.3f} (staying: {one.held_out.last_error:.3f})"
        values = "; ".join(f"{estimate.name} {estimate}" for estimate in one.estimates)
        rows.append(f"| {one.label} | {values} | {one.r2:.3f} | {held} | {'; '.join(one.warnings) or '-'} |")
    for name, picture in figures(fits).items():
        picture.savefig(options.out / f"{name}.png", dpi=120)
    told = ["\n".join(rows), "\n".join(f"- {note}" for note in fits.notes)]
    for x in ("compute", "rollouts"):
        points = power_points(curves, x)
        table = [f"| N | runs | k over {x}, no law of N |", "|---|---|---|"]
        table += [f"| {size:.3g} | {num} | {plain(k)} |" for size, num, k in slopes(points)]
        bend = curvature(points)
        table += ["", f"Change of the slope per decade of {x}: {bend or 'too few points'}."]
        told.append("\n".join(table))
        if len({run.size for run in curves}) > 2:
            told.append(largest(predict_largest(curves, x), x))
    return told


def largest(found: SizePrediction, x: str) -> str:
    """The largest size as the smaller ones predict it, and as it was."""
    missed = 10**found.loss.value - 10**found.loss_seen.value
    inside = found.loss.low <= found.loss_seen.value <= found.loss.high
    same = 10**found.same_slope - 10**found.loss_seen.value
    return "\n".join(
        [
            f"Largest size over {x}, N = {found.size:.3g}, from the smaller ones ({found.fit['K_max'].name} "
            f"{found.fit['K_max']}, {found.fit['N_0'].name} {found.fit['N_0']}):",
            "",
            "| | predicted | seen |",
            "|---|---|---|",
            f"| k | {plain(found.k)} | {plain(found.k_seen)} |",
            f"| log10 L at the end | {plain(found.loss)} | {plain(found.loss_seen)} |",
            "",
            f"Error in test loss {missed:+.4f}, {'inside' if inside else 'outside'} the interval; with the slope of "
            f"the next smaller size: {same:+.4f}.",
        ]
    )


def plain(estimate: Estimate) -> str:
    """Value and interval, without a mark."""
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


if __name__ == "__main__":
    main()
