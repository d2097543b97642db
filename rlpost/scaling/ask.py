"""What the fits recommend for a budget, with intervals, and what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlpost.errors import RunError
from rlpost.scaling.fit import Estimate, Fit, fit
from rlpost.scaling.fits import Fits, fit_power, groups_of
from rlpost.scaling.laws import Array, Sigmoid, Slope
from rlpost.scaling.points import Points
from rlpost.scaling.runs import RunCurve, alike

FAR = 3.0
"""Times the compute that was spent, from which on a prediction is called an extrapolation."""
SURE = 0.9
"""Share of the draws in which a choice must be the best to be recommended alone."""
FREE_PASSES, TOO_MANY = 25, 100
"""Passes over the same prompts that cost nothing, and that over-fitted, in arXiv:2509.25300."""


@dataclass(frozen=True)
class Choice:
    """One thing that could be bought with the budget."""

    name: str
    passed: Estimate
    """Held-out pass@1 at the end."""
    steps: float
    compute: float
    ahead: float
    """Compute over the most that a run of this kind has spent."""
    draws_S: Array = field(repr=False)


@dataclass
class Answer:
    """What to do, and what is not known."""

    choices: list[Choice] = field(default_factory=list)
    """Best first."""
    recommended: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            f"  {one.name}: pass@1 {one.passed}, {one.steps:.0f} steps, {one.compute:.3g} FLOPs" for one in self.choices
        ]
        said = ["With this budget, by the power law:", *rows] if rows else []
        said += ["Recommended:", *(f"  - {text}" for text in self.recommended or ["nothing: see below"])]
        return "\n".join([*said, "What the runs cannot say:", *(f"  - {text}" for text in self.unknown or ["-"])])


def ask(fits: Fits, *, flops: float | None = None, hours: float | None = None) -> Answer:
    """Size of model, steps, rollouts a prompt and batch for a budget in FLOPs or in hours on one device."""
    if (flops is None) == (hours is None):
        raise RunError("scaling ask needs one budget (--budget FLOPS or --hours HOURS): give one of the two")
    if not (flops or hours or 0) > 0:
        raise RunError(f"the budget must be above 0 (got {flops if hours is None else hours})")
    answer = Answer()
    budget = _Budget(flops, hours)
    for told in (_size, _group_size, _batch, _passes):
        told(fits, budget, answer)
    return answer


@dataclass(frozen=True)
class _Budget:
    flops: float | None
    hours: float | None

    def steps(self, group: Sequence[RunCurve]) -> float:
        """Steps of runs like these that it buys."""
        what, have = ("compute", self.flops) if self.hours is None else ("seconds", self.hours * 3600)
        return float(have or 0.0) / float(np.mean([run.per_step(what) for run in group]))


def _size(fits: Fits, budget: _Budget, answer: Answer) -> None:
    """The size of model, and the steps."""
    power = fits.named("power law", "compute")
    alone = power or fits.named("power law, one size", "compute")
    if not alone:
        answer.unknown.append("size and steps: no power law in compute could be fitted (see the notes of the fit)")
        return
    groups = [group for group in groups_of(fits.runs) if any(run.name in alone[0].points.names for run in group)]
    answer.choices = ranked([_choice(alone[0], group, budget, f"N = {group[0].size:.3g}") for group in groups])
    best = answer.choices[0]
    close = contenders(answer.choices)
    if len({group[0].size for group in groups}) > 1:
        answer.recommended.append(f"model: {' or '.join(one.name for one in close)}")
        if len(close) > 1:
            answer.unknown.append(f"which of {', '.join(one.name for one in close)} is best: none wins in {SURE:.0%}")
        answer.unknown.append("sizes that were not run: the law's constant E(N) is known for these sizes alone")
    else:
        answer.unknown.append("size of model: all runs have the same")
    answer.recommended.append(f"steps: {best.steps:.0f} ({best.name}), for pass@1 {best.passed}")
    if best.ahead > FAR:
        answer.unknown.append(
            f"whether the line holds so far: it is {best.ahead:.1f} times the compute of any such run"
        )
    doubts = [one.name for one in alone[0].estimates if not one.identified]
    if doubts:
        answer.unknown.append(f"{' and '.join(doubts)}: not identified; intervals of sizes that were run stand anyway")
    _ceiling(fits, best, answer)


def _ceiling(fits: Fits, best: Choice, answer: Answer) -> None:
    """A sigmoid that stays below the power law."""
    for found in fits.named("sigmoid", "compute"):
        top = found["A"]
        if top.identified and top.high < best.passed.low:
            answer.unknown.append(
                f"which law holds: the sigmoid ({found.label}) ends at A = {top}, below what the power law promises"
            )


def _choice(power: Fit, group: Sequence[RunCurve], budget: _Budget, name: str) -> Choice:
    """The end of a run with this budget, by the power law with the group's own constants."""
    steps = budget.steps(group)
    compute = steps * float(np.mean([run.per_step("compute") for run in group]))
    value, draws_S = loss_at(power, group, compute)
    ends = power.replicates.interval(draws_S, value)
    low, high = (1 - 10 ** min(end, 0.0) for end in reversed(ends))
    passed = Estimate("pass@1", 1 - 10**value, low, high, "fraction")
    ahead = compute / max(float(run.compute_e[-1]) for run in group)
    return Choice(name, passed, steps, compute, ahead, 1 - 10**draws_S)


def loss_at(power: Fit, group: Sequence[RunCurve], compute: float) -> tuple[float, Array]:
    """log10 L of these runs at a compute, mean over them; and of each replicate, with the scatter between runs."""
    members = [i for i, name in enumerate(power.points.names) if name in {run.name for run in group}]
    x = np.array([[group[0].size if math.isfinite(group[0].size) else 1.0, math.log10(compute)]])
    own = power.offset_R[members]
    value = float(power.law.predict(power.theta, x)[0] + own.mean())
    many = power.law.predict(power.replicates.theta_Sp, x)[:, 0] + power.replicates.offset_SR[:, members].mean(1)
    between = float(np.std(own, ddof=1)) if len(own) > 1 else power.noise
    rng = np.random.default_rng(0)
    return value, many + rng.standard_normal(len(many)) * between / math.sqrt(len(own))


def ranked(choices: Sequence[Choice]) -> list[Choice]:
    """Best first."""
    return sorted(choices, key=lambda one: -one.passed.value)


def contenders(choices: Sequence[Choice]) -> list[Choice]:
    """The fewest choices of which one is the best in nine of ten draws."""
    wins = np.bincount(np.argmax([one.draws_S for one in choices], axis=0), minlength=len(choices))
    order = np.argsort(-wins)
    needed = int(np.searchsorted(np.cumsum(wins[order]), SURE * wins.sum()) + 1)
    return [choices[i] for i in sorted(order[:needed])]


def _group_size(fits: Fits, budget: _Budget, answer: Answer) -> None:
    """Rollouts a prompt."""
    but = ["sampling.group_size", "prompts_per_step", "engine.lr"]
    family = max(groups_of(fits.runs, but), key=lambda group: len({_rollouts(run) for run in group}))
    sizes = sorted({_rollouts(run) for run in family})
    if len(sizes) < 2:
        answer.unknown.append(f"rollouts a prompt: all runs that are otherwise alike draw {sizes[0]}")
        return
    choices = []
    for size in sizes:
        mine = [run for run in family if _rollouts(run) == size]
        group = max(groups_of(mine), key=len)
        try:
            choices.append(_choice(fit_power(group), group, budget, f"{size} rollouts a prompt"))
        except RunError as error:
            answer.unknown.append(f"{size} rollouts a prompt: {error}")
    if choices:
        close = contenders(ranked(choices))
        answer.recommended.append(" or ".join(f"{one.name} (pass@1 {one.passed})" for one in close))


def _rollouts(run: RunCurve) -> int:
    return int(run.recipe.get("sampling", {}).get("group_size", 0))


def _batch(fits: Fits, budget: _Budget, answer: Answer) -> None:
    """Prompts a step."""
    for found in fits.named("batch size"):
        noise, steps = found["B_noise"], found["S_min"]
        if not noise.identified:
            answer.unknown.append(f"prompts a step: B_noise is {noise}; other batch sizes would tell")
            return
        answer.recommended.append(
            f"prompts a step: {noise} has twice the fewest steps ({2 * steps.value:.0f}) and twice the fewest prompts; "
            f"{'a smaller batch saves compute' if budget.hours is None else 'a larger one saves steps, not compute'}"
        )
        return
    scales = [line["noise/scale"] for run in fits.runs for line in run.steps[len(run.steps) // 2 :] if _scaled(line)]
    if scales:
        low, middle, high = np.quantile(scales, [0.1, 0.5, 0.9])
        answer.recommended.append(
            f"prompts a step: about {middle:.3g}, the gradient noise scale of the runs' second half (a tenth of the "
            f"steps below {low:.3g}, a tenth above {high:.3g}); no runs of other batch sizes confirm it"
        )
        return
    answer.unknown.append(
        "prompts a step: no runs that differ in prompts_per_step alone, and no noise/scale was logged"
    )


def _scaled(line: dict[str, float]) -> bool:
    return (line.get("noise/scale") or 0.0) > 0


def _passes(fits: Fits, budget: _Budget, answer: Answer) -> None:
    """How often the budget goes through the training tasks."""
    group = groups_of(fits.runs)[0]
    known = [run for run in group if run.passes > 0 and run.step_e[-1]]
    if not known:
        answer.unknown.append("whether the training tasks suffice: nothing says how often the runs went through them")
        return
    steps = answer.choices[0].steps if answer.choices else budget.steps(group)
    passes = steps * float(np.mean([run.passes / run.step_e[-1] for run in known]))
    limits = [found["R*"] for found in fits.named("data reuse") if found["R*"].identified]
    if limits:
        answer.recommended.append(f"passes over the training tasks: {passes:.1f}; the data bear {limits[0]}")
    elif passes > FREE_PASSES:
        answer.unknown.append(
            f"what {passes:.0f} passes over the training tasks cost: these runs made too few to tell; in "
            f"arXiv:2509.25300 up to {FREE_PASSES} were free and {TOO_MANY} over-fitted"
        )


@dataclass(frozen=True)
class Outlook:
    """Whether the rest of a run is worth its steps."""

    verdict: str
    """`stop`, `go on` or `cannot tell`."""
    gains: dict[str, Estimate]
    """Held-out pass@1 that the remaining steps add, by law."""
    remaining: float
    worth: float

    def __str__(self) -> str:
        by = "; ".join(
            f"{law}: {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" for law, gain in self.gains.items()
        )
        text = f"{self.verdict}: {self.remaining:.0f} steps remain, and should add {self.worth:.3f} or more in pass@1"
        return f"{text} ({by})" if by else f"{text}; there are too few evaluations to fit a law"


def early_stop(run: RunCurve, *, planned: float | None = None, worth: float = 0.01, num: int = 500) -> Outlook:
    """Predict what the remaining steps add, by the sigmoid and by the power law; they must agree on a verdict.

    A law that misses the run's second half by more than twice what the other does has no say.
    """
    end, now = planned or run.planned, float(run.step_e[-1])
    if end <= now:
        raise RunError(f"{run.name} has no steps left (it is at {now:.0f} of {end:.0f}): give --planned STEPS beyond")
    gains, misses = {}, {}
    for name, ahead in (("sigmoid", _sigmoid_gain), ("power law", _power_gain)):
        try:
            gains[name], misses[name] = ahead(run, now, float(end), num)
        except RunError:
            continue
    gains = {name: gain for name, gain in gains.items() if misses[name] <= 2 * min(misses.values())}
    if gains and all(gain.high < worth for gain in gains.values()):
        verdict = "stop"
    elif gains and all(gain.low >= worth for gain in gains.values()):
        verdict = "go on"
    else:
        verdict = "cannot tell"
    return Outlook(verdict, gains, end - now, worth)


def _sigmoid_gain(run: RunCurve, now: float, end: float, num: int) -> tuple[Estimate, float]:
    points = Points(run.step_e[:, None], run.pass_e, np.zeros(len(run.step_e), int), (alike(run),), (run.name,))
    found = fit(Sigmoid(), points, label=run.name, num=num, extrapolate=False)
    x = np.array([[now], [end]])
    value = np.diff(found.law.predict(found.theta, x))[0]
    missed = _second_half(run.pass_e - found.law.predict(found.theta, points.x_nc))
    many = found.law.predict(found.replicates.theta_Sp, x)
    return _gain(found, value, np.diff(many)[:, 0]), missed


def _power_gain(run: RunCurve, now: float, end: float, num: int) -> tuple[Estimate, float]:
    good = (run.step_e > 0) & (run.loss_e > 0)
    x = np.stack([np.ones(good.sum()), np.log10(run.step_e[good])], axis=-1)
    points = Points(x, np.log10(run.loss_e[good]), np.zeros(len(x), int), (alike(run),), (run.name,))
    found = fit(Slope(), points, label=run.name, num=num, extrapolate=False)
    ends = np.array([[1.0, math.log10(now)], [1.0, math.log10(end)]])
    value = -np.diff(10 ** (found.law.predict(found.theta, ends) + found.offset_R))[0]
    many = 10 ** (found.law.predict(found.replicates.theta_Sp, ends) + found.replicates.offset_SR)
    missed = _second_half(10**points.y_n - 10 ** (found.law.predict(found.theta, x) + found.offset_R))
    return _gain(found, value, -np.diff(many)[:, 0]), missed


def _second_half(left: Array) -> float:
    """Root mean square over the second half."""
    return float(np.sqrt(np.mean(left[len(left) // 2 :] ** 2)))


def _gain(found: Fit, value: float, many: Array) -> Estimate:
    low, high = found.replicates.interval(many, float(value))
    return Estimate("gain", float(value), low, high, "fraction")
