"""Documents moved between ranks, so that every rank has as much to compute.

Attention makes a long document dearer than its tokens say, and rollouts differ in length by an order of magnitude:
equal counts are not equal work, and every rank waits for the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rlpost.world import Ranks

T = TypeVar("T")
TOLERANCE = 0.02
"""How far the busiest rank may lie above the mean, as a share of it, before anything is moved."""


def cost(length: int, hidden_size: int) -> float:
    """Work of a document in units of one token's matrix products: `l + l^2 / (12 hidden)`.

    A transformer layer multiplies 24 h^2 a token in its matrices and, causally, 2 h l in its attention.

    >>> cost(120, hidden_size=10), cost(1200, hidden_size=10)
    (240.0, 13200.0)
    """
    return length + length**2 / (12 * hidden_size)


def moves(costs: Sequence[Sequence[float]]) -> list[tuple[int, int, int]]:
    """(from rank, index there, to rank): from the busiest rank to the idlest, as long as that lowers the busiest.

    `costs` are those of each rank's documents. Few documents move: only what evens out the difference.

    >>> moves([[5.0, 4.0, 3.0], [2.0]])
    [(0, 0, 1)]
    >>> moves([[5.0, 4.0], [5.0, 4.0]])
    []
    """
    loads = [sum(own) for own in costs]
    mean = sum(loads) / len(loads)
    left = [dict(enumerate(own)) for own in costs]
    found: list[tuple[int, int, int]] = []
    while True:
        high, low = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[high] - loads[low]
        # Half the gap would even the two out; the nearest document that leaves both below the busiest.
        fitting = [(abs(c - gap / 2), i) for i, c in left[high].items() if 0 < c < gap]
        if loads[high] <= (1 + TOLERANCE) * mean or not fitting:
            return found
        _, i = min(fitting)
        moved = left[high].pop(i)
        loads[high], loads[low] = loads[high] - moved, loads[low] + moved
        found.append((high, i, low))


def balanced(items: Sequence[T], costs: Sequence[float], world: Ranks) -> list[T]:
    """This rank's items after the moves: its own that stay, in order, then those that arrive. Every rank calls it."""
    if world.size == 1:
        return list(items)
    plan = moves(world.all_gather_object(list(costs)))
    if not plan:
        return list(items)
    leaving = {i: to for rank, i, to in plan if rank == world.rank}
    every_rank = world.all_gather_object([(to, items[i]) for i, to in leaving.items()])
    arriving = [item for sent in every_rank for to, item in sent if to == world.rank]
    return [*(item for i, item in enumerate(items) if i not in leaving), *arriving]
