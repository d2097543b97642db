"""Several sources of training tasks in fixed shares: a curriculum for each, asked in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlpost.errors import RunError
from rlpost.task_filters import label
from rlpost.task_recipe import Tasks, TaskSource
from rlpost.types import Outcome, Task


def mixed(asked: Tasks, tasks: Sequence[Task], make: Callable[[list[Task]], Any]) -> Any:
    """One curriculum over all tasks; where the sources have weights, one for each source behind the same verbs."""
    sources = {label(source): source for source in asked.sources.values()}
    if any(source.weight is None for source in sources.values()) or len(sources) == 1:
        return make(list(tasks))
    pools = {name: [task for task in tasks if task.source == name] for name in sources}
    if empty := [name for name, pool in pools.items() if not pool]:
        raise RunError(
            f"every source of tasks.train with a weight must have a task left (none of {', '.join(empty)}): take it "
            "out, or see what its filters, duplicates and tasks.decontaminate left out with `rlpost tasks`"
        )
    return Mixture({name: make(pool) for name, pool in pools.items()}, pools, sources)


class Mixture:
    """Curricula of one kind, each over its own source.

    Of the first n tasks a source with share w has given k with |k - w n| < 1, for every n: Tijdeman, "The chairman
    assignment problem", 1980. A step is as mixed as its size allows, and a run that goes on keeps the order.
    """

    def __init__(
        self, parts: Mapping[str, Any], pools: Mapping[str, Sequence[Task]], sources: Mapping[str, TaskSource]
    ) -> None:
        self.parts = dict(parts)
        whole = sum(source.weight or 0.0 for source in sources.values())
        self.shares = {name: (source.weight or 0.0) / whole for name, source in sources.items()}
        self.chosen = dict.fromkeys(self.parts, 0)
        self._asked = list(self.parts)
        self._part_of = {task.key: name for name, pool in pools.items() for task in pool}
        first = next(iter(self.parts.values()))
        self.measure_tries = getattr(first, "measure_tries", None)
        # The loop asks whether a curriculum has these; the mixture has them where its parts do.
        for name, method in (("wants_measured", self._wants), ("correction", self._correction), ("add", self._add)):
            if hasattr(first, name):
                setattr(self, name, method)

    @property
    def added(self) -> list[Task]:
        """What came while the run went on."""
        return [task for part in self.parts.values() for task in getattr(part, "added", ())]

    def select(self, n: int) -> list[Task]:
        """The next n tasks."""
        turns = [self._next() for _ in range(n)]
        drawn = {name: iter(part.select(count)) for name, part in self.parts.items() if (count := turns.count(name))}
        self._asked = list(drawn)
        return [next(drawn[name]) for name in turns]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Tell each part how its own tasks went."""
        for name, part in self.parts.items():
            part.observe([outcome for outcome in outcomes if self._part_of.get(outcome.key) == name])

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, and how often each was chosen."""
        return {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "chosen": dict(self.chosen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the sources must be the same."""
        if set(state.get("parts", ())) != set(self.parts):
            raise RunError(
                f"tasks.train must have the sources that the run began with (now {', '.join(self.parts)}; then "
                f"{', '.join(state.get('parts', ())) or 'one without weights'}): give the same, or begin a new run"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
            self._part_of |= {task.key: name for task in getattr(part, "added", ())}
        self.chosen = {name: int(state["chosen"][name]) for name in self.parts}

    def metrics(self) -> dict[str, float]:
        """The figures of each part that gave a task of the last choice, under the name of its source."""
        return {f"{key}/{name}": value for name in self._asked for key, value in self.parts[name].metrics().items()}

    def _next(self) -> str:
        """Of the sources that are far enough behind their shares, the one that may wait least."""
        drawn, slack = sum(self.chosen.values()) + 1, 1 / (2 * len(self.shares) - 2)
        behind = {name: share * drawn - self.chosen[name] for name, share in self.shares.items()}
        due = [name for name in behind if behind[name] >= slack - 1e-9]
        name = min(due, key=lambda name: (1 - slack - behind[name]) / self.shares[name])
        self.chosen[name] += 1
        return name

    def _wants(self) -> list[Task]:
        return [task for part in self.parts.values() for task in part.wants_measured()]

    def _correction(self, key: str) -> float:
        return float(self.parts[self._part_of[key]].correction(key))

    def _add(self, tasks: Sequence[Task]) -> None:
        first = next(iter(self.parts))
        for name, part in self.parts.items():
            if mine := [task for task in tasks if (task.source if task.source in self.parts else first) == name]:
                part.add(mine)
                self._part_of |= {task.key: name for task in mine}
