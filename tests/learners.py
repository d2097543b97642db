"""Simulated learners with known abilities: what a curriculum chooses is answered and learnt from by a formula.

A task of skill s and difficulty b is solved with probability sigmoid(theta_s - b). After a step of n groups of G
answers, k of them right,

    theta_s += rate / n * sum over the groups of  4 k/G (1 - k/G) (1 if the group is of skill s, else transfer)

so that a group without spread teaches nothing, as with a group-mean baseline. Two kinds of tasks teach nothing at all:
`hopeless` ones are never solved, `coin` ones are guessed in half of the tries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpost.types import Outcome, Task


@dataclass(frozen=True)
class World:
    """What there is to learn."""

    skills: tuple[float, ...] = (1.5,)
    """Mean difficulty of each skill's tasks."""
    spread: float = 1.5
    """Standard deviation of difficulty within a skill."""
    hopeless: float = 0.0
    """Share of tasks that are never solved."""
    coins: float = 0.0
    """Share of tasks that are guessed."""
    size: int = 1000
    start: float = -0.5
    target: float = 0.7
    """Mean success on the tasks that can be learnt."""
    rate: float = 0.03
    transfer: float = 0.2


WORLDS = {
    "one skill": World(),
    "four skills": World(skills=(-1.0, 0.5, 2.0, 3.5), spread=1.0),
    "hopeless and guessed tasks": World(hopeless=0.2, coins=0.2),
}


@dataclass
class Learner:
    """A policy whose ability is known."""

    world: World
    seed: int
    theta: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        world, rng = self.world, np.random.default_rng((self.seed, 7))
        self.rng = np.random.default_rng((self.seed, 8))
        self.theta = np.full(len(world.skills), world.start)
        self.skill = rng.integers(0, len(world.skills), world.size)
        self.b = rng.normal(np.array(world.skills)[self.skill], world.spread)
        kind = rng.random(world.size)
        self.hopeless, self.coin = kind < world.hopeless, kind > 1 - world.coins
        self.learnable = ~(self.hopeless | self.coin)
        guess = np.where(self.hopeless, self.b.max(), np.where(self.coin, rng.permutation(self.b), self.b))
        edges = np.quantile(guess, np.arange(1, 6) / 6)
        level = np.digitize(guess + rng.normal(0, 1, world.size), edges)
        self.tasks = [Task(str(i), f"task {i}", extra={"level": int(level[i])}) for i in range(world.size)]
        self.rollouts = 0

    @property
    def success(self) -> float:
        """Mean success on what can be learnt."""
        return float(self._p(np.flatnonzero(self.learnable)).mean())

    def answer(self, tasks: Sequence[Task], step: int, tries: int, *, measured: bool = False) -> list[Outcome]:
        """Outcomes of some tries at each task; unless measured, what they teach is learnt."""
        places = np.array([int(task.key) for task in tasks])
        passes = self.rng.binomial(tries, self._p(places))
        self.rollouts += tries * len(tasks)
        if not measured:
            signal = 4 * passes / tries * (1 - passes / tries) * self.learnable[places]
            own = np.bincount(self.skill[places], weights=signal, minlength=len(self.theta))
            gain = own + self.world.transfer * (signal.sum() - own)
            self.theta = self.theta + self.world.rate * gain / len(tasks)
        flags = [(True,) * k + (False,) * (tries - k) for k in passes]
        return [Outcome(task.key, (), step, flag, measured=measured) for task, flag in zip(tasks, flags, strict=True)]

    def _p(self, places: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(self.b[places] - self.theta[self.skill[places]]))
        return np.where(self.hopeless[places], 0.0, np.where(self.coin[places], 0.5, p))


@dataclass(frozen=True)
class Course:
    """How one run went."""

    rollouts: int | None
    """Until the target was reached, measurements counted; None: it was not."""
    correlation: float | None
    """Spearman's, of the curriculum's difficulties with the true ones of what can be learnt; None: it has none."""


def course(
    make: Callable[..., Any], world: World, seed: int, *, prompts: int = 32, tries: int = 8, steps: int = 2500
) -> Course:
    """Let a curriculum teach a learner until it reaches the world's target."""
    from scipy.stats import spearmanr

    learner = Learner(world, seed)
    curriculum = make(learner.tasks, seed=seed)
    reached = None
    for step in range(steps):
        if wanted := getattr(curriculum, "wants_measured", list)():
            answers = getattr(curriculum, "measure_tries", None) or tries
            curriculum.observe(learner.answer(wanted, step, answers, measured=True))
        curriculum.observe(learner.answer(curriculum.select(prompts), step, tries))
        if learner.success >= world.target:
            reached = learner.rollouts
            break
    if not hasattr(curriculum, "estimate"):
        return Course(reached, None)
    found = spearmanr(curriculum.estimate()[learner.learnable], _hardness(learner)).statistic
    return Course(reached, float(found))


def _hardness(learner: Learner) -> np.ndarray:
    """b - theta of what can be learnt: how difficult it is for this learner now."""
    return (learner.b - learner.theta[learner.skill])[learner.learnable]
