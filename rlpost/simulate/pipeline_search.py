"""Which split of a cluster, which bound on staleness and which group size train the most tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from rlpost.errors import RunError
from rlpost.simulate.cluster import Cluster, changed, check
from rlpost.simulate.pipeline_figures import Figures, figures, simulated

FIRST, FINEST = Fraction(1, 4), Fraction(1, 32)
"""Of all GPUs: how far apart the first splits are, and the last."""
GOOD_ENOUGH = 0.98
"""Of the best rate: what is fresher and reaches that is preferred."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to use the cluster, and what came of it."""

    cluster: Cluster
    figures: Figures

    @property
    def rate(self) -> float:
        """What is searched for."""
        return self.figures.trained_per_s


@dataclass(frozen=True, slots=True)
class Found:
    """A search that has ended."""

    trials: list[Trial]
    """Best first."""
    advised: Trial
    """The one with the smallest bound on staleness among those that are as good as the best."""


def search(cluster: Cluster, group_sizes: Sequence[int] = (), tell: Callable[[str], None] = lambda _: None) -> Found:
    """Splits and bounds at the description's group size, then other group sizes with the best of them.

    Bounds are 0, 1, 2, 4, ... up to the description's, which is always tried; rollouts a step stay as they are.
    """
    tried: dict[tuple[str, int | None, int, int], Trial] = {}

    def attempt(**values: int | str | None) -> Trial:
        asked = changed(cluster, **(relaxed(cluster, values)))
        key = (asked.placement, asked.generator_gpus, asked.max_staleness, asked.group_size)
        if key not in tried:
            tell(f"{asked.placement}, {asked.generating} generate, k = {key[2]}, groups of {key[3]}")
            if problems := check(asked):
                raise RunError("\n  - ".join(["the search cannot try all of its ways:", *problems]))
            tried[key] = Trial(asked, figures(simulated(asked)))
        return tried[key]

    def rate_of_split(k: int, gpus: int) -> float:
        return attempt(placement="separate", generator_gpus=gpus, max_staleness=k).rate

    for k in bounds(cluster.max_staleness):
        attempt(placement="colocated", generator_gpus=None, max_staleness=k)
        splits(cluster, partial(rate_of_split, k))
    best = advised(tried.values())
    own = {"placement": best.cluster.placement, "max_staleness": best.cluster.max_staleness}
    for size in group_sizes:
        prompts, rest = divmod(cluster.rollouts, size)
        if rest or not prompts:
            raise RunError(
                f"--group-sizes must divide the {cluster.rollouts} rollouts of a step (got {size}): choose another"
            )
        for gpus in around(best.cluster):
            attempt(**own, generator_gpus=gpus, group_size=size, prompts_per_step=prompts)
    ordered = sorted(tried.values(), key=lambda one: -one.rate)
    return Found(ordered, advised(ordered))


def relaxed(cluster: Cluster, values: dict[str, int | str | None]) -> dict[str, int | str | bool | None]:
    """The same without what the bound on staleness does not allow."""
    k = int(values["max_staleness"] or 0)
    found: dict[str, int | str | bool | None] = {**values}
    found["ahead"] = None if cluster.ahead is None else min(k, cluster.ahead)
    if k:
        found["partial_tokens"] = None
    return found


def bounds(most: int) -> list[int]:
    """Bounds on staleness to try.

    >>> bounds(0), bounds(1), bounds(6)
    ([0], [0, 1], [0, 1, 2, 4, 6])
    """
    found = [0, *(1 << i for i in range(most.bit_length()))]
    return [*(k for k in found if k < most), most]


def splits(cluster: Cluster, rate: Callable[[int], float]) -> None:
    """Try numbers of GPUs that generate, ever closer around the best."""
    step = FIRST
    tried = {gpus: rate(gpus) for gpus in whole(cluster, [FIRST, 2 * FIRST, 3 * FIRST])}
    while tried and step > FINEST:
        step /= 2
        best = Fraction(max(tried, key=lambda gpus: tried[gpus]), cluster.gpus)
        tried |= {gpus: rate(gpus) for gpus in whole(cluster, [best - step, best + step]) if gpus not in tried}


def around(cluster: Cluster) -> list[int | None]:
    """A split and its neighbours."""
    if cluster.placement == "colocated":
        return [None]
    own = Fraction(cluster.generating, cluster.gpus)
    return [*whole(cluster, [own - 2 * FINEST, own, own + 2 * FINEST])]


def whole(cluster: Cluster, shares: Sequence[Fraction]) -> Iterator[int]:
    """These shares of a cluster's GPUs, in whole replicas, where both sides then have some."""
    size = cluster.replicas.tensor_parallel
    last = 0
    for share in shares:
        gpus = round(share * cluster.gpus / size) * size
        if last < gpus < cluster.gpus:
            last = gpus
            yield gpus


def advised(trials: Collection[Trial]) -> Trial:
    """Of what comes near the best, the smallest bound on staleness, and of that the best."""
    best = max(one.rate for one in trials)
    near = [one for one in trials if one.rate >= GOOD_ENOUGH * best]
    least = min(one.cluster.max_staleness for one in near)
    return max((one for one in near if one.cluster.max_staleness == least), key=lambda one: one.rate)
