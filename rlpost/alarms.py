"""Signs that a run goes wrong: rules over its figures so far, each with a sentence on what to do.

A rule sees the lines of `metrics.jsonl` up to one of them, of steps and of evaluations, and says what it sees or None.
Rules look at means of several steps, so that one odd step raises nothing, except where one odd step is the sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, variance

Figures = Mapping[str, float | None]
"""One line of `metrics.jsonl`: None stands for what was not finite."""

FEW, SOME, MANY = 5, 10, 20
"""Steps of a mean, of a trend, of a baseline."""
REACH = 200
"""Lines that a rule looks back at most, and lines of the start that are kept."""


class Past:
    """The lines up to one of them."""

    def __init__(self, rows: Sequence[Figures], end: int | None = None) -> None:
        self.rows = rows
        self.end = len(rows) if end is None else end

    def last(self, name: str, n: int, *, skip: int = 0) -> list[float]:
        """The newest n finite values before the newest `skip`, in their order; fewer where there are fewer."""
        found: list[float] = []
        for i in range(self.end - 1, max(self.end - 1 - REACH, -1), -1):
            value = self.rows[i].get(name)
            if value is not None and math.isfinite(value):
                found.append(value)
                if len(found) == n + skip:
                    break
        return found[skip:][::-1]

    def first(self, name: str, n: int) -> list[float]:
        """The first n finite values."""
        found: list[float] = []
        for i in range(min(self.end, REACH)):
            value = self.rows[i].get(name)
            if value is not None and math.isfinite(value):
                found.append(value)
                if len(found) == n:
                    break
        return found

    def mean(self, name: str, n: int = FEW) -> float | None:
        """Mean of the newest n values; None where there are fewer."""
        values = self.last(name, n)
        return fmean(values) if len(values) == n else None

    def start(self, name: str, n: int = FEW) -> float | None:
        """Mean of the first n values; None where there are not n others after them."""
        values = self.first(name, n)
        return fmean(values) if len(values) == n and len(self.last(name, 2 * n)) == 2 * n else None

    def newest(self) -> Figures:
        """The line that the rules are asked about."""
        return self.rows[self.end - 1]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule looks for, and what a person should do then.

    >>> RULES["kl_spike"].title
    'KL spike'
    """

    title: str
    sees: Callable[[Past], str | None]
    advice: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """A rule that has fired.

    >>> Alarm("kl_spike", 7, "KL to the reference is 0.9 nats.", active=True).line()[:21]
    'alarm at step 8: KL s'
    """

    name: str
    step: int
    """0-based, of the line at which it first fired."""
    said: str
    active: bool = False
    """Whether it would fire at the newest line as well."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return RULES[self.name].title

    @property
    def advice(self) -> str:
        """What to do."""
        return RULES[self.name].advice

    def line(self) -> str:
        """One line for a log."""
        return f"alarm at step {self.step + 1}: {self.title}. {self.said} {self.advice}"


def entropy_collapse(past: Past) -> str | None:
    """Entropy below a fifth of the start's while much is still unsolved; solved tasks may well have none."""
    before, now = past.start("policy/entropy"), past.mean("policy/entropy")
    if before is None or now is None or now >= 0.2 * before:
        return None
    solved = past.mean("reward/solved_frac")
    if solved is not None and solved >= 0.85:
        return None
    return f"Entropy fell from {before:.3g} to {now:.3g} nats a token."


def entropy_rise(past: Past) -> str | None:
    """Entropy three times the start's, and by half a nat."""
    before, now = past.start("policy/entropy"), past.mean("policy/entropy")
    if before is None or now is None or now < 3 * before or now < before + 0.5:
        return None
    return f"Entropy rose from {before:.3g} to {now:.3g} nats a token."


def kl_spike(past: Past) -> str | None:
    """One step's KL to the reference far above that of the steps before."""
    values = past.last("policy/kl_ref", MANY + 1)
    if len(values) <= SOME or past.newest().get("policy/kl_ref") is None:
        return None
    usual, now = median(values[:-1]), values[-1]
    if now < max(5 * usual, usual + 0.05):
        return None
    return f"KL to the reference is {now:.3g} nats a token, after a median of {usual:.3g}."


def mismatch(past: Past) -> str | None:
    """Trainer and generator disagree on fresh tokens by more than rounding."""
    fresh = "mismatch/age_0/" if past.last("mismatch/age_0/k3", 1) else "mismatch/"
    k3, ess = past.mean(f"{fresh}k3"), past.mean(f"{fresh}ess_frac")
    if k3 is not None and k3 > 0.01:
        return f"KL between generator and trainer is {k3:.3g} nats a token before the first update."
    if ess is not None and ess < 0.9:
        return f"The effective sample size of the generator's tokens is {ess:.0%} before the first update."
    return None


def length_explosion(past: Past) -> str | None:
    """Answers half as long again as at the start, and many cut off."""
    before, now = past.start("rollouts/length_mean"), past.mean("rollouts/length_mean")
    cut = past.mean("rollouts/truncated_frac")
    if before is None or now is None or cut is None or now < 1.5 * before or cut < 0.2:
        return None
    return f"Answers grew from {before:.0f} to {now:.0f} tokens, and {cut:.0%} run into the limit."


def truncation(past: Past) -> str | None:
    """Two of five answers run into the limit, however long the run."""
    cut = past.mean("rollouts/truncated_frac")
    return None if cut is None or cut < 0.4 else f"{cut:.0%} of the answers run into the length limit."


def reward_hacking(past: Past) -> str | None:
    """The reward rises while success falls: held out, or of the best of k, or of the first reward, which decides."""
    rise = trend(past, "reward/mean")
    if rise is None or rise.z < 3:
        return None
    widest = max((int(name[len("rollouts/pass@") :]) for name in past.newest() if _is_pass(name)), default=0)
    for name, what in ((f"rollouts/pass@{widest}", f"pass@{widest} of training"), ("rollouts/pass@1", "its pass@1")):
        fall = trend(past, name)
        if fall is not None and fall.z < -3 and fall.change < -0.03:
            return f"The reward rose by {rise.change:.3g} while {what} fell by {-fall.change:.3g}."
    return None


def held_out_fall(past: Past) -> str | None:
    """Held-out pass@1 below its best by more than chance, while the reward is no lower than it was then."""
    if past.newest().get("eval/pass@1") is None:
        return None
    found = [(i, x) for i in range(past.end) if (x := past.rows[i].get("eval/pass@1")) is not None]
    best_at, best = max(found, key=lambda pair: pair[1])
    now, problems = found[-1][1], past.newest().get("eval/num_problems") or 1.0
    error = math.sqrt((best * (1 - best) + now * (1 - now)) / problems)
    if now > best - 3 * error or now > best - 0.02:
        return None
    then, reward = Past(past.rows, best_at + 1).mean("reward/mean"), past.mean("reward/mean")
    if then is None or reward is None or reward < then:
        return None
    return f"Held-out pass@1 fell from {best:.3f} to {now:.3f} while the reward went from {then:.3g} to {reward:.3g}."


def zero_spread(past: Past) -> str | None:
    """Four of five groups have equal rewards, and so no gradient in most algorithms."""
    spread = past.mean("groups/spread_frac")
    if spread is None or spread >= 0.2:
        return None
    solved = past.mean("reward/solved_frac")
    why = "" if solved is None else f"; {solved:.0%} of the answers are right"
    return f"Only {spread:.0%} of the groups have differing rewards{why}."


def gradient_spike(past: Past) -> str | None:
    """One gradient far above those before, not finite, or skipped."""
    now = past.newest()
    if "optim/grad_norm" not in now:
        return None
    skipped = past.last("optim/skipped_steps", 2)
    value = now["optim/grad_norm"]
    if value is None or not math.isfinite(value) or (len(skipped) == 2 and skipped[1] > skipped[0]):
        return "A gradient was not finite; its update was skipped."
    before = past.last("optim/grad_norm", MANY, skip=1)
    if len(before) < SOME or value < 20 * median(before) or value < 1e-3:
        return None
    return f"The gradient's norm is {value:.3g}, after a median of {median(before):.3g}."


def unjudged(past: Past) -> str | None:
    """A tenth of the rollouts got no verdict from a reward."""
    names = [name for name in past.newest() if name.startswith("reward/unjudged/")]
    rollouts = past.mean("rollouts/num")
    for name in names:
        missed = past.mean(name)
        if missed is not None and rollouts and missed > 0.1 * rollouts:
            part = name.rpartition("/")[2]
            return f"The reward {part} could not judge {missed / rollouts:.0%} of the rollouts."
    return None


def reward_fails(past: Past) -> str | None:
    """One in a hundred verdicts is a timeout, a crash or an error of the reward, whatever the recipe makes of it."""
    rollouts = past.mean("rollouts/num")
    for name in past.newest():
        if name.startswith("reward/endings/") and name.endswith(("/timeout", "/crash", "/error")):
            failed = past.mean(name)
            if failed is not None and rollouts and failed > 0.01 * rollouts:
                reward, _, ending = name.removeprefix("reward/endings/").rpartition("/")
                return f"The reward {reward} ended in a {ending} on {failed / rollouts:.0%} of the rollouts."
    return None


@dataclass(frozen=True, slots=True)
class Trend:
    """How a figure moved from one window of steps to a later one.

    >>> Trend(change=0.1, z=4.0).change
    0.1
    """

    change: float
    z: float
    """In standard errors of the difference."""


def trend(past: Past, name: str) -> Trend | None:
    """From the SOME values that lie MANY back to the newest SOME; None where there are not so many."""
    late, early = past.last(name, SOME), past.last(name, SOME, skip=MANY)
    if len(late) < SOME or len(early) < SOME:
        return None
    change = fmean(late) - fmean(early)
    error = math.sqrt((variance(late) + variance(early)) / SOME)
    return Trend(change, change / error if error else math.copysign(math.inf, change) if change else 0.0)


def _is_pass(name: str) -> bool:
    return name.startswith("rollouts/pass@") and name[len("rollouts/pass@") :].isdigit()


RULES: dict[str, Rule] = {
    "entropy_collapse": Rule(
        "entropy collapse",
        entropy_collapse,
        "The policy stops exploring: raise algorithm.loss.clip_high, steer the entropy (algorithm.entropy.target), "
        "lower engine.lr, or go back to an earlier checkpoint.",
    ),
    "entropy_rise": Rule(
        "entropy rising",
        entropy_rise,
        "The policy is dissolving: lower engine.lr or algorithm.entropy.coef, and look at rollouts for gibberish.",
    ),
    "kl_spike": Rule(
        "KL spike",
        kl_spike,
        "One update moved the policy far: lower engine.lr or engine.grad_clip, raise algorithm.kl.coef, and look "
        "at the step's gradient and rollouts.",
    ),
    "mismatch": Rule(
        "generator and trainer disagree",
        mismatch,
        "The gradient is biased: use float32 in the head or the generator, add a correction (algorithm.mismatch), and "
        "see whether the canary and the temperature agree.",
    ),
    "length_explosion": Rule(
        "length explosion",
        length_explosion,
        "Answers grow without finishing: read the longest rollouts, add a length reward (algorithm.length), or raise "
        "sampling.max_new_tokens if they are sound.",
    ),
    "truncation": Rule(
        "truncated answers",
        truncation,
        "Rewards of cut answers say little: raise sampling.max_new_tokens, or leave them out (algorithm.truncated).",
    ),
    "reward_hacking": Rule(
        "sign of reward hacking",
        reward_hacking,
        "The policy may be gaming the reward or narrowing to few answers: read the best-rewarded new rollouts, check "
        "the reward's parts, and stop at the checkpoint before.",
    ),
    "held_out_fall": Rule(
        "held-out success falls",
        held_out_fall,
        "What is learned does not carry over: read the rollouts for tricks, use more or other training tasks, and keep "
        "the checkpoint of the best evaluation.",
    ),
    "zero_spread": Rule(
        "groups without spread",
        zero_spread,
        "Most rollouts teach nothing: choose tasks nearer to the policy's ability (curriculum), refill "
        "(algorithm.groups.without_spread=refill), widen groups, or show hints where all fail.",
    ),
    "gradient_spike": Rule(
        "gradient spike",
        gradient_spike,
        "Look at the rollouts of this step; if it repeats, lower engine.lr or engine.grad_clip.",
    ),
    "unjudged": Rule(
        "rollouts without a verdict",
        unjudged,
        "They teach nothing: read them, and mend the reward or the answers that it is given.",
    ),
    "reward_fails": Rule(
        "a reward fails",
        reward_fails,
        "samples.jsonl says where; `rlpost try-reward REWARD --run RUN` asks it again.",
    ),
}


def alarms_of(rows: Sequence[Figures]) -> list[Alarm]:
    """Every alarm of a history, at the line where it first fired, in that order."""
    found: dict[str, Alarm] = {}
    for end in range(1, len(rows) + 1):
        for alarm in fired(Past(rows, end), but=found):
            found[alarm.name] = alarm
    return [replace(alarm, active=still_on(rows, alarm.name)) for alarm in found.values()]


def still_on(rows: Sequence[Figures], name: str) -> bool:
    """Whether a rule fires at the newest line of the kind that it reads, a step's or an evaluation's."""
    ends = (end for end in range(len(rows), 0, -1) if ("eval/pass@1" in rows[end - 1]) == (name == "held_out_fall"))
    end = next(ends, 0)
    return bool(end) and RULES[name].sees(Past(rows, end)) is not None


def fired(past: Past, but: Iterable[str] = ()) -> list[Alarm]:
    """The alarms of one line, without those in `but`."""
    known = set(but)
    step = int(past.newest().get("step") or 0)
    seen = [(name, rule.sees(past)) for name, rule in RULES.items() if name not in known]
    return [Alarm(name, step, said, active=True) for name, said in seen if said is not None]


class Lookout:
    """Says each alarm once while a run goes on."""

    def __init__(self, rows: Iterable[Figures] = ()) -> None:
        self.rows: list[Figures] = list(rows)
        self.said = {alarm.name for alarm in alarms_of(self.rows)}
        """Those of the run's earlier part among them: they were said then."""

    def observe(self, step: int, figures: Mapping[str, float]) -> list[Alarm]:
        """Take in a line, of a step or of an evaluation; the alarms that it is the first to raise."""
        self.rows.append({**figures, "step": step})
        alarms = fired(Past(self.rows), but=self.said)
        self.said |= {alarm.name for alarm in alarms}
        return alarms
