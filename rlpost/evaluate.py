"""Held-out pass@k.

An answer is correct where the recipe's first reward gives it at least 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.algorithm_recipe import Interruption
from rlpost.collect import collect, shard
from rlpost.engine import Engine
from rlpost.errors import RunError
from rlpost.generate.base import Generator
from rlpost.recipe import Evaluation
from rlpost.render import Renderer
from rlpost.score import BoundReward, score
from rlpost.types import Group, Sampling, Task
from rlpost.world import World

EVAL_SEED_OFFSET = 1 << 20
"""Keeps the seeds of evaluation apart from those of training."""


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation needs but the policy."""

    tasks: Sequence[Task]
    recipe: Evaluation
    renderer: Renderer
    rewards: Sequence[BoundReward]
    sampling: Sampling
    seed: int
    world: World
    interruption: Interruption = field(default_factory=Interruption)

    def __call__(self, generator: Generator, engine: Engine) -> dict[str, float]:
        """Sample `n` answers a problem from the engine's policy, and say how many are right."""
        return tabulate(self.rows(generator, engine), self.recipe.n)

    def rows(self, generator: Generator, engine: Engine) -> list[dict[str, Any]]:
        """How it went with each problem, of all ranks, in their order.

        The same problems get the same seeds at every call, so that two evaluations differ by the policy alone.
        """
        mine = shard(self.tasks, self.world.rank, self.world.size)
        with generator.awake(engine, engine.updates):
            groups = self.world.together(
                lambda: collect(
                    generator,
                    self.renderer,
                    mine,
                    self.sampling,
                    group_size=self.recipe.n,
                    first_group=0,
                    seed=self.seed + EVAL_SEED_OFFSET,
                    interruption=self.interruption,
                )
            )
        self.world.together(lambda: score(groups, self.rewards))
        return [row for rows in self.world.all_gather_object([self._row(group) for group in groups]) for row in rows]

    def _row(self, group: Group) -> dict[str, Any]:
        level = group.task.extra.get(self.recipe.by) if self.recipe.by else None
        return {
            "correct": sum(bool(rollout.passed) for rollout in group.rollouts),
            "level": None if level is None else f"{self.recipe.by}={level}",
            "tokens": sum(len(rollout.token_ids) for rollout in group.rollouts),
            "truncated": sum(rollout.truncated for rollout in group.rollouts),
        }


def tabulate(rows: Sequence[dict[str, Any]], n: int) -> dict[str, float]:
    """pass@k over all problems for every power of two up to n, and pass@1 by level."""
    if not rows:
        raise RunError("tasks.eval must hold at least one problem (it is empty): add some, or raise tasks.eval.limit")
    powers = [1 << i for i in range(n.bit_length())]
    result: dict[str, float] = {
        f"pass@{k}": sum(pass_at_k(n, row["correct"], k) for row in rows) / len(rows) for k in powers
    }
    result["loss"] = 1 - result["pass@1"]
    if result[f"pass@{powers[-1]}"] and len(powers) > 1:
        result["concentration"] = result["pass@1"] / result[f"pass@{powers[-1]}"]
    result["length_mean"] = sum(row["tokens"] for row in rows) / (n * len(rows))
    result["truncated_frac"] = sum(row["truncated"] for row in rows) / (n * len(rows))
    result["num_problems"] = len(rows)
    result["n"] = n
    levels = sorted({row["level"] for row in rows if row["level"] is not None}, key=lambda level: (len(level), level))
    for level in levels:
        values = [row["correct"] / n for row in rows if row["level"] == level]
        result[f"pass@1/{level}"] = sum(values) / len(values)
    return result


def against_first(rows: Sequence[dict[str, Any]], first: Sequence[int]) -> dict[str, float]:
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
