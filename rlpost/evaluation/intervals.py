"""How sure a figure is: the bootstrap over problems, whose answers stay together.

Samples of one problem are alike, so problems are what is drawn anew: n answers each do not make an interval n times
as sure. Miller, arXiv:2411.00640, section 2.2, asks for the same by clustered standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

DRAWS = 4000


def intervals(
    values: Mapping[str, Sequence[float | None]], *, seed: int = 0, differences: bool = False
) -> dict[str, tuple[float, float]]:
    """95 % of the mean of each figure, from its value at each problem; None: it has none there.

    Quantiles of m resampled problems are stretched about the mean by t / z and sqrt(m / (m - 1)), arXiv:1411.5279, as
    they are too narrow for few problems. Where all problems have the same share, which leaves the bootstrap nothing to
    draw from, it is Wilson's interval of m tries. One problem has no interval. `differences` have no bounds.
    """
    every = {name: _interval(each, seed, share=is_share(name) and not differences) for name, each in values.items()}
    return {name: ends for name, ends in every.items() if ends is not None}


def is_share(name: str) -> bool:
    """Whether a figure lies between 0 and 1.

    >>> is_share("pass@4"), is_share("length_mean")
    (True, False)
    """
    return name.startswith(("pass@", "maj@")) or name in ("passuntil", "truncated_frac")


def _interval(values: Sequence[float | None], seed: int, *, share: bool) -> tuple[float, float] | None:
    import numpy as np

    from rlpost.report.intervals import wilson
    from rlpost.scaling.bootstrap import stretch_of

    there = np.array([value for value in values if value is not None], dtype=np.float64)
    m = len(there)
    if m < 2:
        return None
    mean = float(there.mean())
    if not there.std():
        return wilson(mean, m) if share else (mean, mean)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(m, np.full(m, 1 / m), size=DRAWS) @ there / m
    wide = stretch_of(m - 1) * math.sqrt(m / (m - 1))
    low, high = mean + wide * (np.quantile(drawn, [0.025, 0.975]) - mean)
    return (max(0.0, float(low)), min(1.0, float(high))) if share else (float(low), float(high))
