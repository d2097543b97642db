"""L1's reward for keeping to a length that the prompt asks for; list it under `group_rewards`."""

from __future__ import annotations

from rlpost.types import Group


def length_budget(
    group: Group, *, column: str = "budget", mode: str = "exact", alpha: float = 3e-4, delta: float = 0.5
) -> list[float]:
    """What L1 adds to a reward that is 1 for a correct answer; the budget in tokens is `task.extra[column]`.

    `exact`: -alpha |budget - length|. `max`: clip(alpha (budget - length) + delta, 0, 1) - 1 for a correct answer,
    0 for a wrong one, so that their sum is the product. L1, arXiv:2503.04697, eq. 1 and 2.
    """
    if mode not in ("exact", "max"):
        raise ValueError(f"length_budget.mode must be exact or max (got {mode!r})")
    if column not in group.task.extra:
        raise ValueError(f"length_budget needs tasks with a column {column!r}: name it in tasks.train.extra")
    budget = float(group.task.extra[column])
    found = []
    for rollout in group.rollouts:
        left = budget - len(rollout.token_ids)
        if mode == "exact":
            found.append(-alpha * abs(left))
        else:
            found.append(min(1.0, max(0.0, alpha * left + delta)) - 1.0 if rollout.passed else 0.0)
    return found
