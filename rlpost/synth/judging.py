"""Whether written answers pass, by the recipe's first reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlpost.generate.writers import Written
from rlpost.recipe import Recipe
from rlpost.reward_recipe import bind_rewards
from rlpost.score import score
from rlpost.synth.rows import Row, rollout_of
from rlpost.types import Group, Task

Judge = Callable[[Task, Sequence[Written]], list[bool | None]]


def passed_by(recipe: Recipe) -> Judge:
    """Says of each text whether it passes as an answer to a task; None where the reward cannot judge."""
    rewards = bind_rewards(recipe.rewards, recipe.failure)

    def judge(task: Task, written: Sequence[Written]) -> list[bool | None]:
        rollouts = [rollout_of(task, one.text, one.finish) for one in written]
        score([Group(0, task, rollouts)], rewards)
        return [rollout.passed for rollout in rollouts]

    return judge


def task_of(row: Mapping[str, object] | Row, answer: str | None = None) -> Task:
    """The task of a row; `answer`: what its answer is taken to be."""
    given = row.get("answer") if answer is None else answer
    solution = row.get("solution")
    return Task(
        key=str(row["id"]),
        prompt=row["prompt"],  # type: ignore[arg-type]
        answer=None if given is None else str(given),
        solution=None if solution is None else str(solution),
        source="synth",
    )
