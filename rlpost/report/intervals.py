"""How sure a success rate is, from what an evaluation logs."""

from __future__ import annotations

import math
from collections.abc import Mapping

Z = 1.959964
"""Of 95 %."""


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate p among n independent tries, doi:10.1080/01621459.1927.10502953.

    >>> [round(x, 3) for x in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    p = min(max(p, 0.0), 1.0)
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def effective_tries(pass_1: float, pass_2: float | None, problems: float, n: float) -> float:
    """How many independent tries a mean over problems with n answers each is worth: from `problems` to n times as many.

    Var(mean) = (Var(p) + E[p (1 - p)] / n) / problems over problems with success rates p, and both moments follow from
    pass@1 = E[p] and pass@2 = 1 - E[(1 - p)^2]. Without pass@2 the least is taken, which makes the interval wide.

    >>> effective_tries(0.5, 0.75, 100, 8), effective_tries(0.5, 0.5, 100, 8)    # all alike; each all or nothing
    (800.0, 100.0)
    """
    spread = pass_1 * (1 - pass_1)
    if pass_2 is None or n < 2 or spread <= 0:
        return problems
    between = max((1 - pass_2) - (1 - pass_1) ** 2, 0.0)
    within = max(spread - between, 0.0)
    variance = between + within / n
    return min(max(problems * spread / variance, problems), problems * n) if variance else problems * n


def interval(
    figures: Mapping[str, float | None], name: str, *, problems: float, n: float
) -> tuple[float, float] | None:
    """95 % of a pass@k in a line of figures; None where it is not there.

    For k > 1 the figure of a problem is no mean of tries, and the problems alone count.
    """
    value = figures.get(name)
    if value is None or problems < 1:
        return None
    family, _, k = name.rpartition("@")
    if k != "1":
        return wilson(value, problems)
    return wilson(value, effective_tries(value, figures.get(f"{family}@2"), problems, n))
