"""Broadened rollouts: hundreds of answers to a prompt, in chunks, as many as its outcome is worth. arXiv:2510.01180."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from rlpost.errors import RunError
from rlpost.subsample import balanced_inclusion, spread_inclusion, systematic, uniform_inclusion
from rlpost.types import Group, Request

RULES = ("balanced", "spread", "random")


class Broaden:
    """Ask for `chunk` more rollouts at a time until a group has `width`; each chunk is scored before the next.

    Adaptive width, with `hopeless` > 0: Wald's sequential test on the number of successes (and on that of failures)
    ends a group whose rate is `hopeless` or less rather than `worthwhile` or more, at an error of `error` either way.
    What such groups save is spent on the others, up to `max_width`, where most spread is to be expected.

    Sub-sampled training, with `train` > 0: so many rollouts of the group are trained, chosen by `rule`, each weighted
    by 1 / the probability that it was chosen; advantages are those of the whole group (`subsample.py`).
    """

    def __init__(
        self,
        *,
        seed: int,
        width: int = 512,
        chunk: int = 64,
        max_width: int = 0,
        hopeless: float = 0.0,
        worthwhile: float = 0.02,
        error: float = 0.05,
        train: int = 0,
        rule: str = "balanced",
    ) -> None:
        _check(locals())
        self.seed, self.width, self.chunk, self.max_width = seed, width, chunk, max(max_width, width)
        self.hopeless, self.worthwhile, self.error = hopeless, worthwhile, error
        self.train, self.rule = train, rule
        self._granted: dict[int, int] = {}
        self._complete: list[tuple[int, bool]] = []
        """(rollouts, decided early) of this step's groups."""

    def begin(self, step: int, groups: Sequence[Group]) -> None:
        """Say how many rollouts each group gets in this wave: a chunk, and what others have saved."""
        open_groups = [group for group in groups if not self.decided(group)]
        saved = sum(max(0, self.width - num(group)) for group in groups if self.decided(group))
        spent = sum(max(0, num(group) - self.width) for group in groups)
        extra = saved - spent
        self._granted = {}
        for group in sorted(open_groups, key=lambda group: (-expected_spread(group), group.id)):
            missing = self.width - num(group)
            if missing > 0:
                self._granted[group.id] = min(self.chunk, missing)
            else:
                self._granted[group.id] = max(0, min(self.chunk, self.max_width - num(group), extra))
                extra -= self._granted[group.id]

    def more(self, group: Group) -> list[Request]:
        """What `begin` granted."""
        granted = self._granted.get(group.id, 0)
        return [group.request(granted)] if granted else []

    def sample(self, group: Group) -> None:
        """Choose what is trained of a complete group."""
        self._complete.append((num(group), self.decided(group)))
        if not self.train:
            return
        judged = [rollout for rollout in group.rollouts if rollout.reward is not None]
        if self.train >= len(judged):
            return
        passed = [bool(rollout.passed) for rollout in judged]
        if self.rule == "balanced":
            inclusion = balanced_inclusion(passed, self.train)
        elif self.rule == "spread":
            inclusion = spread_inclusion([rollout.reward for rollout in judged], self.train)
        else:
            inclusion = uniform_inclusion(len(judged), self.train)
        strata = passed if self.rule == "balanced" else ()
        chosen = set(systematic(inclusion, random.Random(f"{self.seed} {group.id}"), strata=strata))
        for i, rollout in enumerate(judged):
            rollout.inclusion = inclusion[i] if i in chosen else 0.0

    def metrics(self) -> dict[str, float]:
        """`width_mean`: rollouts of a group; `decided_frac`: groups that the sequential test ended before `width`."""
        done, self._complete = self._complete, []
        if not done:
            return {}
        early = sum(decided and width < self.width for width, decided in done)
        return {"width_mean": sum(width for width, _ in done) / len(done), "decided_frac": early / len(done)}

    def decided(self, group: Group) -> bool:
        """Whether the test has ended: as good as nobody solves it, or as good as everybody does."""
        if not self.hopeless:
            return False
        judged = [rollout.passed for rollout in group.by_policy if rollout.passed is not None]
        successes = sum(judged)
        return any(self._accepts(n, len(judged)) for n in (successes, len(judged) - successes))

    def _accepts(self, hits: int, tries: int) -> bool:
        """Wald: sum of log likelihood ratios of `worthwhile` over `hopeless` at or below log(error / (1 - error))."""
        high, low = self.worthwhile, self.hopeless
        ratio = hits * math.log(high / low) + (tries - hits) * math.log((1 - high) / (1 - low))
        return ratio <= math.log(self.error / (1 - self.error))


def num(group: Group) -> int:
    """Rollouts that the policy has written without help."""
    return len(group.by_policy)


def expected_spread(group: Group) -> float:
    """Posterior mean of p (1 - p) under a uniform prior on the success rate: (s + 1)(f + 1) / ((n + 2)(n + 3)).

    >>> from rlpost.types import Task
    >>> round(expected_spread(Group(0, Task("a", "1+1="), [])), 4)
    0.1667
    """
    judged = [rollout.passed for rollout in group.by_policy if rollout.passed is not None]
    successes, n = sum(judged), len(judged)
    return (successes + 1) * (n - successes + 1) / ((n + 2) * (n + 3))


def _check(given: dict[str, Any]) -> None:
    """What is wrong with the parameters of `broaden`, before anything is loaded."""
    width, train, hopeless, worthwhile = (given[name] for name in ("width", "train", "hopeless", "worthwhile"))
    for name, holds, bound in (
        ("width", width >= 2, ">= 2"),
        ("chunk", given["chunk"] >= 1, ">= 1"),
        ("max_width", given["max_width"] == 0 or given["max_width"] >= width, f"0, or >= width={width}"),
        ("hopeless", 0 <= hopeless < worthwhile, f">= 0 and less than worthwhile={worthwhile:g}"),
        ("worthwhile", worthwhile < 1, "below 1"),
        ("error", 0 < given["error"] < 0.5, "in (0, 0.5)"),
        ("train", train == 0 or train >= 2, "0 (all), or >= 2"),
        ("rule", given["rule"] in RULES, f"one of {', '.join(RULES)}"),
    ):
        if not holds:
            raise RunError(f"explore: broaden.{name} must be {bound} (got {given[name]!r})")
