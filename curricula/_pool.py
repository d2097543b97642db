"""What the adaptive curricula share: tasks by place, passes that fade with age, dice, and a state of plain JSON.

Arrays have one entry a task, so that a million tasks cost milliseconds a step. Everything drawn follows from the seed
and a count of draws: the state of the dice is one integer.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from curricula._files import counts_of, difficulty_of, is_file
from rlpost.curriculum import in_memory
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

if TYPE_CHECKING:
    import numpy as np

MAX_LEVELS = 10
_ROWS = {"passes": "<f4", "fails": "<f4", "seen_at": "<i4", "drawn": "<i4", "drawn_at": "<i4"}
"""What is kept of each task that was drawn or tried."""


class Pool:
    """The tasks and what was seen of them; a curriculum extends it with `select`.

    A task's passes follow Beta(borrow m + passes, borrow (1 - m) + fails), where m is the pass rate of its level: tasks
    of similar `difficulty` lend each other as much as `borrow` tries. Both counts are halved every `half_life` steps,
    since the policy that they speak of changes; without new tries a task returns to what its level says.
    """

    passes: np.ndarray
    """Of each task, faded to the step `seen_at`."""
    fails: np.ndarray
    seen_at: np.ndarray
    """Step of the newest outcome; -1: never tried."""
    drawn: np.ndarray
    """How often it was drawn."""
    drawn_at: np.ndarray
    """What `taken` was when it was last drawn; -1: never."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        difficulty: str | None = None,
        half_life: float | None = None,
        borrow: float = 2.0,
    ) -> None:
        """`difficulty`: a file of `rlpost difficulty`, or a column of numbers in `task.extra`."""
        require("half_life", half_life, half_life is None or half_life > 0, "> 0, or null for no fading")
        require("borrow", borrow, borrow > 0, "> 0")
        self.seed, self.half_life, self.borrow, self._difficulty = seed, half_life or math.inf, borrow, difficulty
        self._base = list(tasks)
        self._fingerprint = fingerprint(self._base)
        self._start([])

    def select(self, n: int) -> list[Task]:
        """The tasks of the next n prompts."""
        raise NotImplementedError

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Count passes; rollouts that could not be judged do not count, those that were thrown away do."""
        for outcome in outcomes:
            self._age(outcome.step)
            passes, tries = counted(outcome)
            if tries:
                self._count(self.place[outcome.key], passes, tries - passes, outcome.step)

    def add(self, tasks: Sequence[Task]) -> None:
        """Take in further tasks; they are part of the state, as the recipe does not have them."""
        import numpy as np

        check_new(tasks, self.place)
        self.added += tasks
        self.place |= {task.key: len(self.tasks) + i for i, task in enumerate(tasks)}
        self.tasks += tasks
        for name, kind in _ROWS.items():
            fresh = np.full(len(tasks), -1 if name.endswith("_at") else 0, dtype=kind)
            setattr(self, name, np.concatenate([getattr(self, name), fresh]))
        values = np.array([column_of(task, self._difficulty) for task in tasks])
        self.difficulty = np.concatenate([self.difficulty, values])
        self.level = np.concatenate([self.level, self._level_of(values)])

    def beta(self, at: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The two parameters of each task's posterior now, float32; `at`: of these places alone."""
        import numpy as np

        passes, fails = self.passes[at], self.fails[at]
        if math.isfinite(self.half_life):
            fade = np.exp2((self.seen_at[at] - self.step) * np.float32(1 / self.half_life), dtype=np.float32)
            passes, fails = passes * fade, fails * fade
        means = self.level_means().astype(np.float32)
        mean = means[self.level[at]] if len(means) > 1 else means[0]
        return passes + np.float32(self.borrow) * mean, fails + np.float32(self.borrow) * (1 - mean)

    def pass_rates(self, at: Any = slice(None)) -> np.ndarray:
        """Mean of each task's posterior."""
        a, b = self.beta(at)
        return a / (a + b)

    def estimate(self) -> np.ndarray:
        """How difficult each task is thought to be now; larger is harder, and only the order has a meaning."""
        return 1 - self.pass_rates()

    def level_means(self) -> np.ndarray:
        """Pass rate of each level; few tries are filled up with the rate of all, and those with one pass in two."""
        whole = (1 + self.level_passes.sum()) / (2 + self.level_tries.sum())
        return (self.level_passes + 4 * whole) / (self.level_tries + 4)

    def dice(self) -> np.random.Generator:
        """New random numbers that follow from the seed and how often this was called."""
        import numpy as np

        self.draws += 1
        return np.random.default_rng((self.seed, self.draws))

    def take(self, places: Sequence[int] | np.ndarray) -> list[Task]:
        """These tasks, marked as drawn."""
        import numpy as np

        places = np.asarray(places, dtype=np.int64)
        if self._reported:
            self._chosen, self._reported = [], False
        self._chosen += [self._said_of(places)] if len(places) else []
        np.add.at(self.drawn, places, 1)
        self.drawn_at[places] = self.taken + np.arange(len(places))
        self.taken += len(places)
        return [self.tasks[i] for i in places]

    def draw(self, n: int, weights: np.ndarray) -> list[Task]:
        """Draw n tasks in proportion to weights, none twice before all with a weight were drawn."""
        return self.take(drawn(n, weights, self.dice()))

    def in_rounds(self, n: int, places: np.ndarray) -> list[Task]:
        """Draw n of these places, the least often drawn first, in random order."""
        return self.take(self.least_drawn(n, places))

    def least_drawn(self, n: int, places: np.ndarray) -> np.ndarray:
        """The n of these places that were drawn least, in random order; again from the start where they are too few."""
        import numpy as np

        parts: list[np.ndarray] = []
        often = self.drawn[places] + self.dice().random(len(places), dtype=np.float32)
        while (left := n - sum(map(len, parts))) > 0:
            parts.append(places[smallest(often, left)])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def metrics(self) -> dict[str, float]:
        """What was chosen since the last call, and how much of the pool has been tried."""
        import numpy as np

        self._reported = True
        said = {"tried_frac": float((self.seen_at >= 0).mean()), "tasks": float(len(self.tasks))}
        if not self._chosen:
            return said
        sizes = np.array([part["chosen"] for part in self._chosen])
        names = {name: None for part in self._chosen for name in part}
        said |= {name: _mean([part.get(name, 0.0) for part in self._chosen], sizes) for name in names}
        return {name: x for name, x in said.items() if not math.isnan(x)} | {"chosen": float(sizes.sum())}

    def explain(self, key: str) -> dict[str, float]:
        """What is known of one task, for a person who asks why it was chosen or not."""
        i = self.place[key]
        (a,), (b,) = self.beta([i])
        spread = math.sqrt(a * b / (a + b + 1)) / (a + b)
        seen = {name: float(getattr(self, name)[i]) for name in _ROWS} | {"difficulty": float(self.difficulty[i])}
        return seen | {"pass_rate": float(a / (a + b)), "pass_rate_sd": float(spread), "level": float(self.level[i])}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `select` depends on, apart from the tasks of the recipe and its files."""
        import numpy as np

        rows = np.flatnonzero((self.seen_at >= 0) | (self.drawn > 0)).astype("<i4")
        return {
            "tasks": self._fingerprint,
            "added": [asdict(task) for task in self.added],
            "seed": self.seed,
            "draws": self.draws,
            "taken": self.taken,
            "step": self.step,
            "levels": [self.level_passes.tolist(), self.level_tries.tolist()],
            "at": packed(rows),
            "rows": {name: packed(getattr(self, name)[rows].astype(kind)) for name, kind in _ROWS.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the tasks must be the same."""
        import numpy as np

        check_fingerprint(state["tasks"], self._fingerprint)
        self._start([task_of(row) for row in state["added"]])
        self.seed, self.draws, self.taken, self.step = (state[name] for name in ("seed", "draws", "taken", "step"))
        self.level_passes, self.level_tries = (np.array(values, dtype=np.float64) for values in state["levels"])
        rows = unpacked(state["at"], "<i4")
        for name, kind in _ROWS.items():
            getattr(self, name)[rows] = unpacked(state["rows"][name], kind)

    def _start(self, added: Sequence[Task]) -> None:
        """Begin anew: nothing drawn, nothing seen but what the difficulty's file has."""
        import numpy as np

        self.tasks, self.added = list(self._base), []
        self.place = {task.key: i for i, task in enumerate(self.tasks)}
        size = len(self.tasks)
        for name, kind in _ROWS.items():
            setattr(self, name, np.full(size, -1 if name.endswith("_at") else 0, dtype=kind))
        self.draws, self.taken, self.step = 0, 0, 0
        self._chosen: list[dict[str, float]] = []
        self._reported = True
        self._sources = sorted({task.source for task in self.tasks})
        unknown = np.full(size, math.nan)
        self.difficulty = unknown if self._difficulty is None else difficulty_of(self.tasks, self._difficulty)
        self._edges = edges_of(self.difficulty)
        self.level = self._level_of(self.difficulty)
        self.level_passes, self.level_tries = np.zeros((2, len(self._edges) + 2))
        self._begin_with_counts()
        if added:
            self.add(added)

    def _begin_with_counts(self) -> None:
        """Passes that the difficulty's file counted are tries of step 0."""
        import numpy as np

        if self._difficulty is None or not is_file(self._difficulty):
            return
        passes, tries = counts_of(self.tasks, self._difficulty).T
        self.passes[:], self.fails[:] = passes, tries - passes
        self.seen_at[tries > 0] = 0
        np.add.at(self.level_passes, self.level, passes)
        np.add.at(self.level_tries, self.level, tries)

    def _level_of(self, difficulty: np.ndarray) -> np.ndarray:
        """Which level each task belongs to; the last one is for those whose difficulty is not known."""
        import numpy as np

        level = np.searchsorted(self._edges, difficulty, side="right")
        return np.where(np.isnan(difficulty), len(self._edges) + 1, level).astype(np.int32)

    def _age(self, step: int) -> None:
        """Let what levels know fade until `step`."""
        if step > self.step:
            fade = 2.0 ** ((self.step - step) / self.half_life)
            self.level_passes, self.level_tries, self.step = self.level_passes * fade, self.level_tries * fade, step

    def _count(self, i: int, passes: int, fails: int, step: int) -> None:
        fade = 2.0 ** (min(0, self.seen_at[i] - step) / self.half_life) if self.seen_at[i] >= 0 else 0.0
        self.passes[i] = self.passes[i] * fade + passes
        self.fails[i] = self.fails[i] * fade + fails
        self.seen_at[i] = step
        self.level_passes[self.level[i]] += passes
        self.level_tries[self.level[i]] += passes + fails

    def _said_of(self, places: np.ndarray) -> dict[str, float]:
        """Figures of a choice: size, mean pass rate as it is thought to be, share never tried, difficulty, sources."""
        import numpy as np

        known = self.difficulty[places]
        said = {
            "chosen": float(len(places)),
            "chosen_pass_rate": float(self.pass_rates(places).mean()),
            "chosen_untried": float((self.seen_at[places] < 0).mean()),
            "chosen_again": float((self.drawn[places] > 0).mean()),
            "chosen_difficulty": float(np.nanmean(known)) if not np.isnan(known).all() else math.nan,
        }
        if len(self._sources) > 1 or self.added:
            for i in places:
                name = f"chosen_from/{self.tasks[i].source or 'unknown'}"
                said[name] = said.get(name, 0.0) + 1 / len(places)
        return said


def drawn(n: int, weights: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """Draw n places in proportion to weights without replacement, and again from all where they are too few.

    A race of exponential clocks: the n smallest E_i / w_i, E_i ~ Exp(1). Efraimidis and Spirakis, 2006.
    """
    import numpy as np

    parts: list[np.ndarray] = []
    runners = np.flatnonzero(weights > 0)
    if not len(runners):
        runners, weights = np.arange(len(weights)), np.ones(len(weights), dtype=np.float32)
    speed = weights if len(runners) == len(weights) else weights[runners]
    while (left := n - sum(map(len, parts))) > 0:
        clocks = dice.standard_exponential(len(runners), dtype=np.float32) / speed
        parts.append(runners[smallest(clocks, left)])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def smallest(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the n smallest values, in their order.

    >>> import numpy as np
    >>> smallest(np.array([5.0, 1.0, 3.0]), 2).tolist()
    [1, 2]
    """
    import numpy as np

    found = np.argpartition(values, n - 1)[:n] if n < len(values) else np.arange(len(values))
    return found[np.lexsort((found, values[found]))]


def counted(outcome: Outcome) -> tuple[int, int]:
    """Passes and judged tries of an outcome; without `passed`, a reward of 1 or more passes.

    >>> counted(Outcome("a", (1.0, None, 0.2), 0, (True, None, False))), counted(Outcome("a", (1.0, 0.2), 0))
    ((1, 2), (1, 2))
    """
    passed = outcome.passed or tuple(None if reward is None else reward >= 1.0 for reward in outcome.rewards)
    judged = [flag for flag in passed if flag is not None]
    return sum(judged), len(judged)


def edges_of(difficulty: np.ndarray) -> np.ndarray:
    """Where levels of difficulty part: between its values if these are few, else at its deciles."""
    import numpy as np

    known = difficulty[~np.isnan(difficulty)]
    values = np.unique(known)
    if len(values) <= MAX_LEVELS:
        return (values[1:] + values[:-1]) / 2
    return np.unique(np.quantile(known, np.arange(1, MAX_LEVELS) / MAX_LEVELS))


def fingerprint(tasks: Sequence[Task]) -> str:
    """What tells one list of tasks from another."""
    return hashlib.sha1("\n".join(task.key for task in tasks).encode()).hexdigest()


def check_fingerprint(saved: str, own: str) -> None:
    """Refuse the state of other tasks."""
    if saved != own:
        raise RunError(
            "tasks.train must be what the checkpoint was trained on (its keys differ, in number or in order): give "
            "the same tasks, or start a new run"
        )


def check_new(tasks: Sequence[Task], known: Collection[str]) -> None:
    """Refuse to add tasks whose keys are there already."""
    keys = [task.key for task in tasks]
    again = [key for i, key in enumerate(keys) if key in known or key in keys[:i]]
    if again:
        raise RunError(f"tasks that are added must have new keys, each once (these are there: {', '.join(again[:5])})")


def packed(array: np.ndarray) -> Any:
    """An array as text; as it is, copied, where the state is kept in memory.

    >>> import numpy as np
    >>> unpacked(packed(np.array([1, 2], dtype="<i4")), "<i4").tolist()
    [1, 2]
    """
    if in_memory.get():
        return array.copy()
    return base64.b64encode(zlib.compress(array.tobytes(), 1)).decode("ascii")


def unpacked(text: Any, kind: str) -> np.ndarray:
    """What was given to `packed`."""
    import numpy as np

    if not isinstance(text, str):
        return text.astype(kind)
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind).copy()


def task_of(row: dict[str, Any]) -> Task:
    """A task as `asdict` and JSON left it."""
    return Task(**{**row, "hints": tuple(row["hints"])})


def require(name: str, value: Any, holds: bool, bound: str) -> None:
    """Refuse a parameter of the recipe that is out of bounds."""
    if not holds:
        raise RunError(f"curriculum.{name} must be {bound} (got {value})")


def column_of(task: Task, difficulty: str | None) -> float:
    """A task's own difficulty; NaN where it has none."""
    value = None if difficulty is None or is_file(difficulty) else task.extra.get(difficulty)
    return math.nan if value is None else float(value)


def _mean(values: list[float], sizes: np.ndarray) -> float:
    import numpy as np

    whole = np.array(values)
    known = ~np.isnan(whole)
    return float(np.average(whole[known], weights=sizes[known])) if known.any() else math.nan
