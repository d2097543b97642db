"""A row of the table of algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bundle:
    """A published algorithm as a recipe section.

    >>> from rlpost.algorithms import ALGORITHMS
    >>> ALGORITHMS["dapo"].section["groups"]
    {'without_spread': 'refill', 'max_waves': 10}
    """

    summary: str
    paper: str
    conflicts: str
    """Where other papers decide otherwise, and what of this one is not published or not in the bundle."""
    section: Mapping[str, Any]
    curriculum: str = "uniform"
    """What chooses the tasks where the recipe does not say."""
    explore: Sequence[Mapping[str, Any]] = ()
    """Explorers, where the recipe lists none."""
