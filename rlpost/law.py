"""The entropy-performance law as a run goes on: success bought with entropy, and what is left to buy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LEAST_STEPS = 10
"""Before so many, a line through the steps says nothing."""


class EntropyLaw:
    """R = b - a exp(H) through a run's steps by least squares; R success in training, H the policy's mean entropy.

    Cui et al., arXiv:2505.22617. At H = 0 no entropy is left to be spent: b - a is the most that the law allows for.

    >>> law = EntropyLaw()
    >>> for step in range(10):
    ...     law.observe(entropy=math.log(1 + step / 10), success=0.9 - 0.2 * (1 + step / 10))
    >>> {name: round(x, 6) for name, x in law.figures().items()}
    {'law/slope': 0.2, 'law/intercept': 0.9, 'law/ceiling': 0.7, 'law/r2': 1.0}
    """

    def __init__(self) -> None:
        self.num = 0
        self.mean_x, self.mean_y = 0.0, 0.0
        self.xx, self.xy, self.yy = 0.0, 0.0, 0.0
        """Sums of products of what is left after the means, by Welford's update."""

    def observe(self, *, entropy: float, success: float) -> None:
        """Take note of a step."""
        x, y = math.exp(entropy), success
        self.num += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x, self.mean_y = self.mean_x + dx / self.num, self.mean_y + dy / self.num
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    def figures(self) -> dict[str, float]:
        """The law so far; nothing before 10 steps, or where one of the two has not moved."""
        if self.num < LEAST_STEPS or not (self.xx and self.yy):
            return {}
        slope = -self.xy / self.xx
        intercept = self.mean_y + slope * self.mean_x
        r2 = self.xy**2 / (self.xx * self.yy)
        return {"law/slope": slope, "law/intercept": intercept, "law/ceiling": intercept - slope, "law/r2": r2}

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        vars(self).update(state)
