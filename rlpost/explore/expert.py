"""A worked solution in the group, learned from as if the policy had written it. LUFFY, arXiv:2504.14945."""

from __future__ import annotations

from rlpost.errors import RunError
from rlpost.explore._places import replace_failures
from rlpost.render import Renderer
from rlpost.types import Group, Request

PLACES = ("add", "failures")


class Expert:
    """Put the task's solution, or what column `field` of `tasks.train.extra` holds, into each group.

    Only where the policy's share of successes is at most `threshold` (1: always). `place`: it is added to the group
    (LUFFY: 7 of the policy and 1), or replaces a failure. It is judged by the rewards like any other answer.
    """

    def __init__(self, *, renderer: Renderer, field: str = "", threshold: float = 1.0, place: str = "add") -> None:
        if place not in PLACES:
            raise RunError(f"explore: expert.place must be one of {', '.join(PLACES)} (got {place!r})")
        if not 0 <= threshold <= 1:
            raise RunError(f"explore: expert.threshold must be in [0, 1] (got {threshold})")
        self.renderer, self.field, self.threshold, self.place = renderer, field, threshold, place
        self._too_long = self._missing = 0

    def more(self, group: Group) -> list[Request]:
        """The expert's answer, once."""
        if any(rollout.role == "expert" for rollout in group.rollouts):
            return []
        judged = [rollout.passed for rollout in group.by_policy if rollout.passed is not None]
        if not judged or sum(judged) > self.threshold * len(judged):
            return []
        text = group.task.extra.get(self.field) if self.field else group.task.solution
        if not text:
            self._missing += 1
            return []
        if len(group.prompt_ids) + len(self.renderer.completion_ids(str(text))) > self.renderer.context:
            self._too_long += 1
            return []
        return [
            Request(group.id, group.task, group.prompt_ids, 1, seed=group.seed, role="expert", given=str(text)),
        ]

    def choose(self, group: Group) -> None:
        """Let it take the place of a failure, where that is asked for."""
        if self.place == "failures":
            replace_failures(group, [rollout for rollout in group.rollouts if rollout.role == "expert"], 1)

    def metrics(self) -> dict[str, float]:
        """`too_long`: solutions that do not fit the context; `missing`: groups whose task has none."""
        found = {"too_long": float(self._too_long), "missing": float(self._missing)}
        self._too_long = self._missing = 0
        return found
