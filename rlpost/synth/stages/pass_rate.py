"""Difficult is what the policy seldom solves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlpost.generate.writers import Ask
from rlpost.synth.bench import Bench
from rlpost.synth.judging import passed_by, task_of
from rlpost.synth.rows import Row
from rlpost.synth.store import seed_of
from rlpost.types import Sampling

uses_model = True


def pass_rate(
    rows: Iterable[Row],
    bench: Bench,
    *,
    n: int = 8,
    at_least: float = 0.5,
    model: str = "policy",
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> Iterator[Row]:
    """`n` answers a task, judged by the recipe's rewards; `score` is 1 - pass rate, difficult from `at_least` on.

    A task with no answer that could be judged has no score, and is not difficult.
    """
    limit = max_new_tokens or bench.recipe.sampling.max_new_tokens
    writer = bench.writer(model)
    sampling = Sampling(limit, temperature, stop_ids=writer.stop_ids)
    rewards = passed_by(bench.recipe)
    kept: dict[str, Row] = {}

    def asks() -> Iterator[Ask]:
        for row in rows:
            kept[row["id"]] = row
            yield Ask(row["id"], task_of(row), n, seed_of(bench.seed, row["id"]))

    for ask, written in writer.stream(asks(), sampling):
        row = kept.pop(ask.id)
        flags = [flag for flag in rewards(ask.task, written) if flag is not None]
        score = 1 - sum(flags) / len(flags) if flags else None
        yield {**row, "score": score, "difficult": score is not None and score >= at_least, "tries": len(flags)}
