"""Solutions by a teacher: a local model, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlpost.generate.writers import Ask, Written
from rlpost.synth.bench import Bench
from rlpost.synth.judging import task_of
from rlpost.synth.rows import Row, answer_of, check_answer_rule
from rlpost.synth.store import seed_of
from rlpost.types import Sampling

uses_model = True


def teacher(
    rows: Iterable[Row],
    bench: Bench,
    *,
    model: str = "policy",
    endpoint: str | None = None,
    k: int = 1,
    prompt: str = "{problem}",
    answer: str = "boxed",
    thinking_end: str = "</think>",
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 20,
    max_new_tokens: int = 32768,
) -> Iterator[Row]:
    """`k` solutions a problem; `prompt` says how it is asked, with the problem for `{problem}`.

    What stands before `thinking_end`, or what a server gives apart, is `reasoning`; what follows is `text`. `answer`
    finds the final answer in the text: `boxed`, or a regular expression whose first group it is. The settings are
    ScaleDiff's.
    """
    check_answer_rule(answer, "synth.distil.answer")
    writer = bench.writer(model, endpoint)
    kept: dict[str, Row] = {}

    def asks() -> Iterator[Ask]:
        for row in rows:
            kept[row["id"]] = row
            asked = {**row, "prompt": prompt.replace("{problem}", row["prompt"])}
            yield Ask(row["id"], task_of(asked), k, seed_of(bench.seed, row["id"]))

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, writer.stop_ids)
    for ask, written in writer.stream(asks(), sampling):
        yield {**kept.pop(ask.id), "solutions": [solution(one, thinking_end, answer) for one in written]}


def solution(one: Written, thinking_end: str, answer: str) -> dict[str, Any]:
    """A text as reasoning, what follows it, and the final answer in that.

    >>> solution(Written("hm</think>It is 7.", "stop"), "</think>", r"(\\d+)")
    {'reasoning': 'hm', 'text': 'It is 7.', 'answer': '7', 'finish': 'stop'}
    """
    before, found, after = one.text.rpartition(thinking_end) if thinking_end else ("", "", one.text)
    reasoning = one.reasoning if one.reasoning is not None else before if found else ""
    said = after if found else one.text
    whole = one.finish == "stop"  # a number in the middle of a text that was cut off is no answer
    return {
        "reasoning": reasoning.removeprefix("<think>").strip(),
        "text": said.strip(),
        "answer": answer_of(said, answer) if whole else None,
        "finish": one.finish,
    }
