"""New problems from the trained generator, out of an almost empty prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlpost.generate.writers import Ask
from rlpost.recipe import Prompting
from rlpost.synth.bench import Bench
from rlpost.synth.rows import Row
from rlpost.synth.stages.generator import generator_of, stop_ids
from rlpost.types import Sampling, Task

uses_model = True


def sample(
    rows: Iterable[Row],
    bench: Bench,
    *,
    number: int = 1000,
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 20,
    max_new_tokens: int = 1024,
) -> Iterator[Row]:
    """`number` texts, each with a seed of its own; the settings are ScaleDiff's. `rows` have `id` and `seed`."""
    made = generator_of(bench)
    writer = bench.local(made["model"], prompting=Prompting(chat=False))
    stops = stop_ids(writer.renderer, made["end"])
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, stops)
    task = Task("problem", made["prompt"])
    asks = (Ask(row["id"], task, seed=row["seed"]) for row in rows)
    for ask, [written] in writer.stream(asks, sampling):
        text = written.text.removesuffix(made["end"]) if made["end"] else written.text
        yield {"id": ask.id, "prompt": text.strip(), "seed": ask.seed, "finish": written.finish}
