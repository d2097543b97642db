"""Every law that some runs can bear, fitted; and in words what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from rlpost.errors import RunError
from rlpost.scaling.fit import Estimate, Fit, fit
from rlpost.scaling.laws import Array, BatchTradeOff, DataReuse, EntropyLaw, Law, PowerLaw, Sigmoid, Slope
from rlpost.scaling.points import Points
from rlpost.scaling.runs import Compute, RunCurve, alike, read_runs

X_NAMES = {"compute": "compute C (FLOPs)", "rollouts": "rollouts D", "seconds": "device-seconds"}
LOSS, RATE = "test loss 1 - pass@1", "held-out pass@1"
ENTROPY_FIGURES = ("policy/entropy", "rollouts/pass@1")
REUSED = 4.0
"""Passes over the training tasks from which on one can hope to see what reuse costs."""


@dataclass(frozen=True)
class Fits:
    """What was fitted to some runs."""

    runs: tuple[RunCurve, ...]
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]
    """Laws that were not fitted, and why."""

    def named(self, law: str, x: str | None = None) -> list[Fit]:
        """The fits of a law, such as `sigmoid`; `x` is a key of X_NAMES."""
        return [one for one in self.fits if one.law.name == law and (x is None or one.x_name == X_NAMES[x])]

    def to_dict(self) -> dict[str, Any]:
        """All of it but the points, as plain JSON."""
        return {
            "runs": [str(run.folder) for run in self.runs],
            "fits": [one.to_dict() for one in self.fits],
            "notes": list(self.notes),
        }


def fit_runs(folders: Iterable[str | Path], *, compute: Compute = "total", num: int = 500, seed: int = 0) -> Fits:
    """Read runs and fit every law that they can bear; what they cannot is a note and no error."""
    return fit_curves(read_runs(folders, compute), num=num, seed=seed)


def fit_curves(runs: Sequence[RunCurve], *, num: int = 500, seed: int = 0) -> Fits:
    """The same for runs that were read."""
    found: list[Fit] = []
    notes: list[str] = []

    def attempt(make: Callable[[], Fit]) -> None:
        try:
            found.append(make())
        except RunError as error:
            notes.append(str(error))

    for x in ("compute", "rollouts"):
        attempt(partial(fit_power, runs, x, num=num, seed=seed))
    for group in groups_of(runs):
        attempt(partial(fit_sigmoid, group, num=num, seed=seed))
        attempt(partial(fit_entropy, group, num=num, seed=seed))
    attempt(partial(fit_batch, runs, num=num, seed=seed))
    attempt(partial(fit_reuse, runs, num=num, seed=seed))
    return Fits(tuple(runs), tuple(found), tuple(dict.fromkeys(notes)))


def groups_of(runs: Sequence[RunCurve], but: Sequence[str] = ()) -> list[list[RunCurve]]:
    """Runs that differ by their seed alone, or by the fields `but`, together."""
    found: dict[str, list[RunCurve]] = {}
    for run in runs:
        found.setdefault(alike(run, but), []).append(run)
    return list(found.values())


def fit_power(runs: Sequence[RunCurve], x: str = "compute", *, num: int = 500, seed: int = 0) -> Fit:
    """The power law of test loss over several sizes; over one, its slope alone."""
    points = power_points(runs, x)
    sizes = len(np.unique(points.x_nc[:, 0]))
    law: Law = PowerLaw() if sizes > 1 else Slope()
    found = fit(law, points, label=f"test loss over {x}", x_name=X_NAMES[x], y_name=f"log10 {LOSS}", num=num, seed=seed)
    warnings = [*found.warnings]
    if sizes == 1:
        warnings.append("K_max and N_0 need several sizes of model (there is one): only its own slope is known")
    elif sizes == 2:
        warnings.append("two sizes fit K_max and N_0 whatever is true: only a third can contradict k(N)")
    if len(groups_of(runs, but=["model"])) > 1:
        warnings.append("the runs differ in more than size and seed: what else they differ in is taken for size")
    bend = curvature(points)
    if bend is not None and bend.low * bend.high > 0:
        word = "steeper" if bend.value < 0 else "flatter"
        warnings.append(
            f"not a straight line: it gets {word} as it goes, by {bend} of the slope per decade; what is beyond the "
            "data is not to be had from a line"
        )
    return replace(found, warnings=tuple(warnings))


def power_points(runs: Sequence[RunCurve], x: str) -> Points:
    """log10 L over N and log10 X; without the start (X = 0) and where a loss of 0 is below what was measured."""
    usable = [run for run in runs if math.isfinite(run.size) or len({alike(one) for one in runs}) == 1]
    rows: list[Array] = []
    values: list[Array] = []
    number: list[int] = []
    kept: list[RunCurve] = []
    for run in usable:
        x_e = getattr(run, f"{x}_e")
        good = np.isfinite(x_e) & (x_e > 0) & (run.loss_e > 0)
        if good.sum() >= 2:
            size = run.size if math.isfinite(run.size) else 1.0
            rows.append(np.stack([np.full(good.sum(), size), np.log10(x_e[good])], axis=-1))
            values.append(np.log10(run.loss_e[good]))
            number += [len(kept)] * int(good.sum())
            kept.append(run)
    if not kept:
        raise RunError(
            f"test loss over {x}: runs must have two evaluations or more after their start, of a model whose size is "
            "known (none has): set evaluation.every"
        )
    strata = tuple(alike(run) for run in kept)
    return Points(
        np.concatenate(rows), np.concatenate(values), np.array(number), strata, tuple(run.name for run in kept)
    )


def curvature(points: Points) -> Estimate | None:
    """Change of the slope per decade of X, mean over runs with Student's interval; None below two such runs."""
    bends = []
    for run in range(points.num_runs):
        mine = points.run_n == run
        if mine.sum() >= 4:
            bends.append(2 * float(np.polyfit(points.x_nc[mine, 1], points.y_n[mine], 2)[0]))
    return mean_of(bends, "curvature", "1/decade")


def slopes(points: Points) -> list[tuple[float, int, Estimate]]:
    """For each size: N, its runs, and k(N) as the mean of the runs' own slopes; no law for k is assumed."""
    found: dict[float, list[float]] = {}
    for run in range(points.num_runs):
        mine = points.run_n == run
        slope = -float(np.polyfit(points.x_nc[mine, 1], points.y_n[mine], 1)[0])
        found.setdefault(float(points.x_nc[mine, 0][0]), []).append(slope)
    unknown = float("nan")
    return [
        (size, len(ks), mean_of(ks, "k", "1") or Estimate("k", ks[0], unknown, unknown, "1"))
        for size, ks in sorted(found.items())
    ]


def mean_of(values: Sequence[float], name: str, unit: str) -> Estimate | None:
    """Mean with Student's interval; None below two values."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(name, mean, mean - half, mean + half, unit)


def fit_sigmoid(group: Sequence[RunCurve], x: str = "compute", *, num: int = 500, seed: int = 0) -> Fit:
    """ScaleRL's sigmoid on runs that differ by their seed."""
    label = f"pass rate over {x}, {_called(group)}"
    rows = [(getattr(run, f"{x}_e"), run.pass_e) for run in group]
    if not all(np.isfinite(x_e).all() for x_e, _ in rows):
        raise RunError(f"{label}: nothing says how much {x} the runs took (no figure of it was logged): left out")
    points = _joined([x_e[:, None] for x_e, _ in rows], [y for _, y in rows], group)
    found = fit(Sigmoid(), points, label=label, x_name=X_NAMES[x], y_name=RATE, num=num, seed=seed)
    end, middle = float(points.x_nc.max()), found["C_mid"].value
    warnings = [*found.warnings]
    if end < 2 * middle:
        warnings.append(
            f"A is an extrapolation: the runs end at {end / middle:.2g} of C_mid, and from 2 C_mid on it can be seen"
        )
        known = tuple(replace(one, identified=one.identified and one.name != "A") for one in found.estimates)
        found = replace(found, estimates=known)
    return replace(found, warnings=tuple(warnings))


def fit_entropy(group: Sequence[RunCurve], *, num: int = 500, seed: int = 0) -> Fit:
    """The entropy-performance law on the steps of runs that differ by their seed."""
    label = f"pass rate over entropy, {_called(group)}"
    rows = [
        [(step["policy/entropy"], step["rollouts/pass@1"]) for step in run.steps if _has(step, *ENTROPY_FIGURES)]
        for run in group
    ]
    if min(map(len, rows)) < 4:
        raise RunError(f"{label}: there must be four steps or more with {' and '.join(ENTROPY_FIGURES)}: left out")
    points = _joined([np.array(row)[:, :1] for row in rows], [np.array(row)[:, 1] for row in rows], group)
    x, y = "entropy H (nats)", "pass@1 of training prompts"
    found = fit(EntropyLaw(), points, label=label, x_name=x, y_name=y, num=num, seed=seed)
    ceiling = found["ceiling"]
    if ceiling.value > 1 or found["a"].value <= 0:
        why = f"the ceiling would be {ceiling.value:.2f}" if ceiling.value > 1 else "pass rate rises with entropy"
        return replace(found, warnings=(*found.warnings, f"the law does not hold here: {why}"))
    return found


def fit_batch(runs: Sequence[RunCurve], *, num: int = 500, seed: int = 0) -> Fit:
    """Steps to a pass rate that all reach, over prompts a step, on the runs that are otherwise alike."""
    label = "steps over batch size"
    group = max(groups_of(runs, but=["prompts_per_step", "engine.lr"]), key=lambda one: len(batches_of(one)))
    batches = batches_of(group)
    if len(batches) < 2:
        raise RunError(
            f"{label}: needs runs alike but for prompts_per_step (all have {', '.join(map(str, batches))}): left out"
        )
    target = min(float(run.pass_e.max()) for run in group)
    taken = [run for run in group if run.pass_e[0] < target]
    steps = np.array([steps_to(run, target) for run in taken])
    x = np.array([[float(run.recipe["prompts_per_step"])] for run in taken])
    strata = tuple(str(run.recipe["prompts_per_step"]) for run in taken)
    points = Points(x, np.log(steps), np.arange(len(taken)), strata, tuple(run.name for run in taken))
    found = fit(
        BatchTradeOff(),
        points,
        label=f"steps to pass@1 {target:.3f} over batch size",
        x_name="batch B (prompts)",
        y_name="ln steps",
        num=num,
        seed=seed,
    )
    few = ["two batch sizes fit S_min and B_noise whatever is true: only a third can contradict it"]
    return replace(found, warnings=(*found.warnings, *few * (len(batches) == 2)))


def batches_of(group: Sequence[RunCurve]) -> list[int]:
    """The different prompts a step."""
    return sorted({int(run.recipe.get("prompts_per_step", 0)) for run in group})


def steps_to(run: RunCurve, target: float) -> float:
    """Steps until held-out pass@1 first reaches `target`, on a straight line between evaluations; nan if never."""
    over = np.flatnonzero(run.pass_e >= target)
    if not len(over):
        return float("nan")
    i = int(over[0])
    if i == 0:
        return float(run.step_e[0])
    share = (target - run.pass_e[i - 1]) / (run.pass_e[i] - run.pass_e[i - 1])
    return float(run.step_e[i - 1] + share * (run.step_e[i] - run.step_e[i - 1]))


def fit_reuse(runs: Sequence[RunCurve], *, num: int = 500, seed: int = 0) -> Fit:
    """What further passes over the same prompts are worth, on runs that are otherwise alike."""
    label = "data reuse"
    size = ["tasks.train.config.size", "tasks.train.limit"]
    known = [run for run in runs if run.passes > 0]
    group = max(groups_of(known, but=size), key=len, default=[])
    most = max((run.passes for run in group), default=0.0)
    if most < REUSED:
        raise RunError(
            f"{label}: needs a run that goes through its tasks {REUSED:.0f} times or more (the most is {most:.2g}, by "
            "curriculum/epoch): left out"
        )
    rows = []
    for run in group:
        good = (run.prompts_e > 0) & (run.loss_e > 0)
        unique = run.prompts_e[-1] / run.passes
        rows.append((np.stack([run.prompts_e[good], np.full(good.sum(), unique)], -1), np.log10(run.loss_e[good])))
    points = _joined([x for x, _ in rows], [y for _, y in rows], group)
    return fit(DataReuse(), points, label=label, x_name="prompts D", y_name=f"log10 {LOSS}", num=num, seed=seed)


def _joined(x: Sequence[Array], y: Sequence[Array], group: Sequence[RunCurve]) -> Points:
    number = np.repeat(np.arange(len(group)), [len(one) for one in y])
    names = tuple(run.name for run in group)
    return Points(np.concatenate(x), np.concatenate(y), number, tuple(alike(run) for run in group), names)


def _called(group: Sequence[RunCurve]) -> str:
    names = ", ".join(run.name for run in group[:3])
    return names + (f" and {len(group) - 3} more" if len(group) > 3 else "")


def _has(line: dict[str, Any], *names: str) -> bool:
    return all(line.get(name) is not None for name in names)
