"""Difficult by a file of `rlpost difficulty`: pass rates of a model, or item response theory over several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from curricula._files import rows_of
from rlpost.errors import RunError
from rlpost.synth.bench import Bench
from rlpost.synth.rows import Row

uses_model = False


def measured(
    rows: Iterable[Row],
    bench: Bench,
    *,
    path: str,
    by: Literal["difficulty", "irt"] = "difficulty",
    at_least: float = 0.5,
) -> Iterator[Row]:
    """`score` is the file's `difficulty` (a mean where it has several models), or with `by: irt` b of the Rasch model.

    Difficult from `at_least` on; b = 0 is what a model of average ability solves half of the time. Tasks that the file
    does not have are not difficult.
    """
    found = _irt(path) if by == "irt" else _mean(path)
    if not found:
        raise RunError(f"synth.identify.path must have rows that say how difficult tasks are ({path} has none)")
    for row in rows:
        score = found.get(row["id"])
        yield {**row, "score": score, "difficult": score is not None and score >= at_least}


def _mean(path: str) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows_of(path, "synth.identify.path"):
        if row.get("difficulty") is not None:
            values[str(row["key"])].append(float(row["difficulty"]))
    return {key: sum(some) / len(some) for key, some in values.items()}


def _irt(path: str) -> dict[str, float]:
    import numpy as np

    from curricula._irt import fit

    counts: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows_of(path, "synth.identify.path"):
        if row.get("tries"):
            counts[str(row["model"]), str(row["key"])] = row["passes"], row["tries"]
    models, keys = (list(dict.fromkeys(pair[i] for pair in counts)) for i in (0, 1))
    if len(models) < 2:
        raise RunError(
            f"synth.identify.by=irt needs the pass rates of two models or more (got {len(models)} in {path}): add some "
            "with `rlpost difficulty --models`"
        )
    table: Any = np.zeros((2, len(models), len(keys)))
    for (model, key), pair in counts.items():
        table[:, models.index(model), keys.index(key)] = pair
    return dict(zip(keys, fit(table[0], table[1]).difficulty.tolist(), strict=True))
