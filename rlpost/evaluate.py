"""Held-out pass@k and maj@k, while training and alone.

An answer is correct where the recipe's first reward gives it at least 1; one that it could not judge counts nowhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.algorithm_recipe import Interruption
from rlpost.collect import collect, shard
from rlpost.engine import Engine
from rlpost.errors import RunError
from rlpost.generate.base import Generator
from rlpost.passuntil import estimate, until_passes
from rlpost.recipe import Evaluation
from rlpost.render import Renderer
from rlpost.score import Rewards, score
from rlpost.types import Group, Rollout, Sampling, Task
from rlpost.votes import VOTES, majority_at_k
from rlpost.world import World

EVAL_SEED_OFFSET = 1 << 20
"""Keeps the seeds of evaluation apart from those of training."""
Vote = Callable[[Rollout], Hashable]


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation needs but the policy."""

    tasks: Sequence[Task]
    recipe: Evaluation
    renderer: Renderer
    rewards: Rewards
    sampling: Sampling
    seed: int
    world: World
    interruption: Interruption = field(default_factory=Interruption)
    vote: Vote | None = None
    """The answer of a rollout, for maj@k; None: it is left out."""

    def __call__(self, generator: Generator, engine: Engine) -> dict[str, float]:
        """Sample `n` answers a problem from the engine's policy, and say how many are right."""
        return tabulate(self.rows(generator, engine), self.recipe.n, self.recipe.k)

    def rows(self, generator: Generator, engine: Engine) -> list[dict[str, Any]]:
        """How it went with each problem, of all ranks, in their order.

        The same problems get the same seeds at every call, so that two evaluations differ by the policy alone.
        """
        with generator.awake(engine, engine.updates):
            return [row for row, _ in self.answered(generator, list(enumerate(self.tasks)))]

    def answered(
        self, generator: Generator, places: Sequence[tuple[int, Task]], *, keep: bool = False
    ) -> list[tuple[dict[str, Any], list[Rollout]]]:
        """How it went with some problems of all ranks, by a generator that is awake; `keep`: with the answers."""
        mine = [pair for _, pair in shard(places, self.world.rank, self.world.size)]

        def answer(pending: Sequence[tuple[int, Task]], size: int, turn: int) -> list[Group]:
            groups = collect(
                generator,
                self.renderer,
                pending,
                self.sampling,
                group_size=size,
                first_group=0,
                seed=self.seed + EVAL_SEED_OFFSET + turn,
                interruption=self.interruption,
            )
            score(groups, self.rewards)
            return groups

        found = self.world.together(lambda: until_passes(answer, mine, n=self.recipe.n, until=self.recipe.until))
        rows = [
            (self.row(task, answers), answers if keep else []) for (_, task), answers in zip(mine, found, strict=True)
        ]
        return [row for rank in self.world.all_gather_object(rows) for row in rank]

    def row(self, task: Task, answers: Sequence[Rollout]) -> dict[str, Any]:
        """What is known of one problem: counts of the first n answers, and the votes."""
        level = task.extra.get(self.recipe.by) if self.recipe.by else None
        first = answers[: self.recipe.n]
        passed = [rollout.passed for rollout in first]
        row: dict[str, Any] = {
            "correct": passed.count(True),
            "unjudged": passed.count(None),
            "level": None if level is None else f"{self.recipe.by}={level}",
            "tokens": sum(len(rollout.token_ids) for rollout in first),
            "truncated": sum(rollout.truncated for rollout in first),
        }
        if self.recipe.until is not None:
            said = estimate([rollout.passed for rollout in answers], self.recipe.n)
            row |= {"pass_rate": said["pass_rate"], "drawn": len(answers)}
        return row if self.vote is None else row | {"votes": self._votes(self.vote, first)}

    def _votes(self, vote: Vote, answers: Sequence[Rollout]) -> list[list[int]]:
        """[count, right] of each answer that was given; those that gave none, or could not be judged, do not vote."""
        counts: Counter[tuple[Hashable, bool]] = Counter()
        for rollout in answers:
            said = None if rollout.passed is None else vote(rollout)
            if said is not None:
                counts[said, bool(rollout.passed)] += 1
        return [[count, int(right)] for (_, right), count in counts.items()]


def tabulate(rows: Sequence[dict[str, Any]], n: int, ks: Sequence[int] = ()) -> dict[str, float]:
    """pass@k and maj@k over all problems for every power of two up to n and every k of `ks`, and pass@1 by level."""
    if not rows:
        raise RunError("tasks.eval must hold at least one problem (it is empty): add some, or raise tasks.eval.limit")
    values = per_problem(rows, n, ks)
    result = {name: mean for name, each in values.items() if (mean := mean_of(each)) is not None}
    best = max(int(name.removeprefix("pass@")) for name in values if name.startswith("pass@") and "/" not in name)
    if "pass@1" in result:
        result["loss"] = 1 - result["pass@1"]
        if best > 1 and result.get(f"pass@{best}"):
            result["concentration"] = result["pass@1"] / result[f"pass@{best}"]
    result["num_problems"] = len(rows)
    result["n"] = n
    result["unjudged"] = sum(row["unjudged"] for row in rows)
    if "drawn" in rows[0]:
        result["drawn"] = sum(row["drawn"] for row in rows)
    return result


def per_problem(rows: Sequence[dict[str, Any]], n: int, ks: Sequence[int] = ()) -> dict[str, list[float | None]]:
    """Every figure that is a mean over problems: its value at each of them, None where it has none."""
    wanted = sorted({1 << i for i in range(n.bit_length())} | {k for k in ks if k <= n})
    found: dict[str, list[float | None]] = {
        f"pass@{k}": [
            pass_at_k(n - row["unjudged"], row["correct"], k) if n - row["unjudged"] >= k else None for row in rows
        ]
        for k in wanted
    }
    if all("votes" in row for row in rows):
        for k in (k for k in wanted if k > 1 and (k <= VOTES or k == n)):
            found[f"maj@{k}"] = [majority_at_k(row["votes"], n, k) for row in rows]
    if all("pass_rate" in row for row in rows):
        found["passuntil"] = [row["pass_rate"] for row in rows]
    found["length_mean"] = [row["tokens"] / n for row in rows]
    found["truncated_frac"] = [row["truncated"] / n for row in rows]
    levels = sorted({row["level"] for row in rows if row["level"] is not None}, key=lambda level: (len(level), level))
    for level in levels:
        inside = zip(rows, found["pass@1"], strict=True)
        found[f"pass@1/{level}"] = [value if row["level"] == level else None for row, value in inside]
    return found


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None of nothing."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def against_first(rows: Sequence[Mapping[str, Any]], first: Sequence[int]) -> dict[str, float]:
    """Problems solved at least once now and never at the first evaluation, and the reverse, as shares of all.

    >>> against_first([{"correct": 2}, {"correct": 0}, {"correct": 1}, {"correct": 0}], [0, 3, 1, 0])
    {'gained_frac': 0.25, 'lost_frac': 0.25}
    """
    pairs = [(row["correct"] > 0, before > 0) for row, before in zip(rows, first, strict=True)]
    gained, lost = sum(now > then for now, then in pairs), sum(now < then for now, then in pairs)
    return {"gained_frac": gained / len(pairs), "lost_frac": lost / len(pairs)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that one of k answers is right, from c right ones among n; Chen et al., arXiv:2107.03374.

    1 - C(n - c, k) / C(n, k) = 1 - prod over i = n - c + 1 .. n of (1 - k / i)

    >>> [round(pass_at_k(4, 2, k), 4) for k in (1, 2, 4)]
    [0.5, 0.8333, 1.0]
    """
    if n - c < k:
        return 1.0
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= 1 - k / i
    return 1 - missed
