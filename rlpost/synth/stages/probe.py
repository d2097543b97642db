"""Difficult is where a model that thinks as it sees fit begins to think: ScaleDiff's test, arXiv:2509.21070."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from rlpost.errors import RunError
from rlpost.generate.writers import Ask
from rlpost.synth.bench import Bench
from rlpost.synth.judging import task_of
from rlpost.synth.rows import Row
from rlpost.types import Sampling

uses_model = True
TOP = 20
"""Log-probs that are asked for, as published."""


def probe(
    rows: Iterable[Row],
    bench: Bench,
    *,
    model: str = "THU-KEG/AdaptThink-7B-delta0.05",
    token: str = "</think>",
    at_least: float | None = None,
) -> Iterator[Row]:
    """One token a task, greedy. `token` ends the thinking before it has begun: the model finds the task easy.

    Difficult: the most probable first token is another, as published; or with `at_least` 1 - P(`token`) is so high.
    `score` is 1 - P(`token`), which counts as 0 where it is not among the 20 most probable.
    """
    writer = bench.local(model)
    ids = writer.renderer.text_ids(token)
    if len(ids) != 1:
        raise RunError(f"synth.identify.token must be one token of {model} (got {token!r}, which is {len(ids)})")
    kept: dict[str, Row] = {}

    def asks() -> Iterator[Ask]:
        for row in rows:
            kept[row["id"]] = row
            yield Ask(row["id"], task_of(row))

    for ask, [written] in writer.stream(asks(), Sampling(1, temperature=0.0), first=TOP):
        row = kept.pop(ask.id)
        if not written.first:  # the prompt did not fit
            yield {**row, "score": None, "difficult": False}
            continue
        score = 1 - math.exp(written.first.get(ids[0], -math.inf))
        likeliest = max(written.first, key=lambda one: written.first[one])
        yield {**row, "score": score, "difficult": likeliest != ids[0] if at_least is None else score >= at_least}
