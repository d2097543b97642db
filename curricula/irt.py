"""Tasks in a window around the policy's ability, by item response theory: PUDF's DDS-MAE, arXiv:2408.05326.

Each step theta is estimated by MAP from the newest answers, and tasks with low <= b - theta <= high are trained on. The
paper's window is everything easier than the ability, `window: [null, 0]`; its stagnation rule is `nudge: 0.1`, its last
epochs on all data `all_after`. Difficulties that follow the training, and their prediction from the text for tasks that
were never tried, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from curricula import _irt
from curricula._files import rows_of
from curricula._pool import Pool, counted, packed, require, smallest, unpacked
from rlpost.types import Outcome, Task

if TYPE_CHECKING:
    import numpy as np

MEMORY = 4096
"""Groups that an ability is estimated from, at most."""
DIFFICULTY_SD = 2.0
"""Of a task's b before anything is known of it."""
DRIFT = 0.1
"""Standard deviation of what b moves by in a step."""
REFIT, PATIENCE = 20, 20
"""Steps between predictions of difficulty, and steps without a larger window before a nudge."""
ENOUGH, NEWEST = 30, 20_000
"""Tasks that must have been tried before difficulty is predicted from text, and how many it is learnt from at most."""


class Irt(Pool):
    """Rasch or 2PL difficulties b from `responses`, else from `difficulty`, else 0; b and theta follow the answers.

    b_i is filtered as in Glicko: 1 / precision grows by DRIFT^2 a step, and an outcome of k passes in n tries moves it
    precision += a^2 n p (1 - p),  b -= a (k - n p) / precision,  p = sigmoid(a (theta - b))
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        model: Literal["rasch", "2pl"] = "rasch",
        responses: str | None = None,
        difficulty: str | None = None,
        window: Sequence[float | None] = (-1.5, 1.5),
        half_life: float = 4.0,
        floor: float = 0.1,
        text: bool = True,
        nudge: float = 0.0,
        all_after: int | None = None,
    ) -> None:
        """`responses`: a file of `rlpost difficulty RECIPE --models ...`; `half_life`: of answers about theta.

        `window`: of b - theta, null for no bound; `floor`: share of draws from all tasks, or a wrong b would never be
        put right; `all_after`: the step from which on all draws are.
        """
        require("model", model, model in ("rasch", "2pl"), "rasch or 2pl")
        low, high = (*window, None, None)[:2]
        bounds = len(window) == 2 and (low is None or high is None or low < high)
        require("window", list(window), bounds, "[low, high] with low < high, either of them null for no bound")
        require("half_life", half_life, half_life > 0, "> 0")
        require("floor", floor, 0 <= floor <= 1, "in [0, 1]")
        self.model, self.responses, self.text = model, responses, text
        self.low, self.high = -math.inf if low is None else low, math.inf if high is None else high
        self.ability_half_life, self.floor, self.nudge, self.all_after = half_life, floor, nudge, all_after
        self._features: np.ndarray | None = None
        super().__init__(tasks, seed=seed, difficulty=difficulty)
        self._rewind()

    def select(self, n: int) -> list[Task]:
        """The least often drawn of the window, in random order; where it has too few, the nearest to it as well."""
        import numpy as np

        late = self.all_after is not None and self.step >= self.all_after
        inside = np.zeros(0, dtype=np.int64) if late else self._near(n - self.dice().binomial(n, self.floor))
        outside = np.ones(len(self.tasks), dtype=bool)
        outside[inside] = False
        others = np.flatnonzero(outside) if outside.any() else np.arange(len(self.tasks))
        return self.take(np.concatenate([inside, self.least_drawn(n - len(inside), others)]))

    def _near(self, n: int) -> np.ndarray:
        """Places of n tasks in the window, or near it."""
        import numpy as np

        places = self.window()
        if len(places) >= n:
            return self.least_drawn(n, places)
        gap = self.b - np.float32(self.theta + self.offset)
        outside = np.maximum(self.low - gap, gap - self.high) + 1e-3 * self.dice().random(len(gap))
        return smallest(outside, n)

    def window(self) -> np.ndarray:
        """Places of the tasks that suit the ability."""
        import numpy as np

        gap = self.b - np.float32(self.theta + self.offset)
        return np.flatnonzero((gap >= self.low) & (gap <= self.high))

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Estimate the ability, then the difficulties of what was answered; predict the others now and then."""
        before = self.step
        for outcome in outcomes:
            passes, tries = counted(outcome)
            if tries:
                place = self.place[outcome.key]
                self.b_precision[place] = self._drifted(place, outcome.step)
                self.recent.append([place, passes, tries, outcome.step])
        super().observe(outcomes)
        self._estimate_ability()
        for outcome in outcomes:
            self._move(self.place[outcome.key], *counted(outcome))
        if self.step // REFIT > before // REFIT or (self.seen_at >= 0).sum() < ENOUGH:
            self.predict()
        self._nudge()

    def predict(self) -> None:
        """Give the tasks that were never tried a difficulty: from their text and column, or the mean of the others."""
        import numpy as np

        tried = np.flatnonzero(self.seen_at >= 0)
        if not len(tried):
            return
        if len(tried) > NEWEST:
            tried = tried[smallest(-self.seen_at[tried], NEWEST)]
        b, weight = self.b[tried].astype(np.float64), self.b_precision[tried].astype(np.float64)
        if len(tried) >= ENOUGH and (self.text or self._difficulty is not None):
            predicted = _irt.amortised(self.features(), tried, b, weight)
        elif self._difficulty is None:
            predicted = np.full(len(self.b), np.average(b, weights=weight), dtype=np.float32)
        else:
            return
        untried = self.seen_at < 0
        self.b[untried] = predicted[untried]

    def features(self) -> np.ndarray:
        """What difficulty is predicted from `[tasks, features]`."""
        import numpy as np

        if self._features is None or len(self._features) < len(self.tasks):
            start = 0 if self._features is None else len(self._features)
            known = self.difficulty[start:]
            fresh = np.empty((len(known), 2 + self.text * (_irt.TEXT_FEATURES + 3)), dtype=np.float32)
            fresh[:, 0], fresh[:, 1] = np.nan_to_num(known), np.isnan(known)
            if self.text:
                _irt.text_features((str(task.prompt) for task in self.tasks[start:]), fresh[:, 2:])
            self._features = fresh if self._features is None else np.concatenate([self._features, fresh])
        return self._features

    def add(self, tasks: Sequence[Task]) -> None:
        """Take in further tasks, whose difficulty is predicted where enough others were tried."""
        import numpy as np

        super().add(tasks)
        fresh = np.nan_to_num(self._given(self.difficulty)[-len(tasks) :])
        self.b = np.append(self.b, fresh.astype(np.float32))
        self.slope = np.append(self.slope, np.ones(len(tasks), dtype=np.float32))
        self.b_precision = np.append(self.b_precision, np.full(len(tasks), DIFFICULTY_SD**-2, dtype=np.float32))
        self.predict()

    def estimate(self) -> np.ndarray:
        """b of each task."""
        return self.b

    def metrics(self) -> dict[str, float]:
        """What `Pool` says, ability and its standard error, and the share of tasks in the window."""
        share = len(self.window()) / len(self.tasks)
        own = {"ability": self.theta, "ability_se": self.theta_se, "window_frac": share, "nudged": self.offset}
        return super().metrics() | own

    def state_dict(self) -> dict[str, Any]:
        """As `Pool`, and abilities, difficulties and recent answers."""
        own = {name: getattr(self, name) for name in _NUMBERS} | {"recent": [list(row) for row in self.recent]}
        return super().state_dict() | own | {name: packed(getattr(self, name)) for name in _ARRAYS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._rewind()  # as long as before anything was added, which `Pool` adds again
        super().load_state_dict(state)
        for name in _NUMBERS:
            setattr(self, name, state[name])
        for name in _ARRAYS:
            setattr(self, name, unpacked(state[name], "<f4"))
        self.recent = [list(row) for row in state["recent"]]

    def _rewind(self) -> None:
        import numpy as np

        size = len(self._base)
        self.theta, self.theta_se, self.offset, self.stale, self.largest = 0.0, 1.0, 0.0, 0, 0
        self.recent: list[list[int]] = []
        self._features = None
        self.b = np.nan_to_num(self._given(self.difficulty[:size])).astype(np.float32)
        self.slope = np.ones(size, dtype=np.float32)
        self.b_precision = np.full(size, DIFFICULTY_SD**-2, dtype=np.float32)
        if self.responses is not None:
            self._fit_responses(self.responses)

    def _given(self, difficulty: np.ndarray) -> np.ndarray:
        return _irt.logit_difficulty(difficulty) if self._difficulty is not None else difficulty

    def _fit_responses(self, path: str) -> None:
        """Difficulties and slopes from answers of several models; the newest one's ability is where theta starts."""
        import numpy as np

        places, passes, tries = matrix(path, self.place)
        found = _irt.fit(passes, tries, model=self.model, difficulty_sd=DIFFICULTY_SD)
        self.b[places], self.slope[places], self.b_precision[places] = found.difficulty, found.slope, found.precision
        self.theta = float(found.ability[-1])
        self.seen_at[places] = np.maximum(self.seen_at[places], 0)
        self.predict()

    def _estimate_ability(self) -> None:
        import numpy as np

        oldest = self.step - 5 * self.ability_half_life
        self.recent = [row for row in self.recent[-MEMORY:] if row[3] >= oldest]
        if not self.recent:
            return
        places, passes, tries, steps = np.array(self.recent, dtype=np.int64).T
        fade = 2.0 ** ((steps - self.step) / self.ability_half_life)
        b, slope = self.b[places].astype(np.float64), self.slope[places].astype(np.float64)
        prior = (self.theta, 1.0)
        found = _irt.ability_map(b, passes * fade, tries * fade, slope=slope, start=self.theta, prior=prior)
        self.theta, self.theta_se = found

    def _drifted(self, place: int, step: int) -> float:
        """Precision of a difficulty after the steps in which nothing was heard of it."""
        ago = max(0, step - max(0, int(self.seen_at[place])))
        return max(1 / (1 / float(self.b_precision[place]) + DRIFT**2 * ago), DIFFICULTY_SD**-2)

    def _move(self, place: int, passes: int, tries: int) -> None:
        a = float(self.slope[place])
        p = 1 / (1 + math.exp(min(50.0, a * (float(self.b[place]) - self.theta))))
        self.b_precision[place] += a**2 * tries * p * (1 - p)
        self.b[place] -= min(1.0, max(-1.0, a * (passes - tries * p) / float(self.b_precision[place])))

    def _nudge(self) -> None:
        """Where the window has not grown for `patience` calls, look `nudge` above the ability."""
        if not self.nudge:
            return
        size = len(self.window())
        self.stale = self.stale + 1 if size <= self.largest else 0
        self.largest = max(self.largest, size)
        if self.stale >= PATIENCE:
            self.offset, self.stale = self.offset + self.nudge, 0


_NUMBERS = ("theta", "theta_se", "offset", "stale", "largest")
_ARRAYS = ("b", "slope", "b_precision")


def matrix(path: str, place: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The places of the file's tasks, and passes and tries `[models, tasks]`; 0 tries where a model has no row."""
    import numpy as np

    rows = [row for row in rows_of(path, "curriculum.responses") if row["key"] in place]
    require("responses", path, all("passes" in row and "tries" in row for row in rows), "a file with passes and tries")
    models = {name: i for i, name in enumerate(dict.fromkeys(str(row.get("model", "")) for row in rows))}
    require("responses", f"{len(models)} model in {path}", len(models) > 1, "answers of at least two models")
    keys = list(dict.fromkeys(row["key"] for row in rows))
    column = {key: i for i, key in enumerate(keys)}
    passes, tries = np.zeros((2, len(models), len(keys)))
    for row in rows:
        at = models[str(row.get("model", ""))], column[row["key"]]
        passes[at] += row["passes"]
        tries[at] += row["tries"]
    return np.array([place[key] for key in keys]), passes, tries
