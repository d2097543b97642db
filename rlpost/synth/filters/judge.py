"""A model says whether a problem is well posed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rlpost.errors import RunError
from rlpost.generate.writers import Ask
from rlpost.synth.bench import Bench
from rlpost.synth.rows import Row
from rlpost.synth.store import seed_of
from rlpost.types import Sampling, Task

ASK = (
    "Here is a problem.\n\n{problem}\n\nIs it well posed: complete, free of contradictions, and with exactly one "
    "answer that can be checked? Do not solve it. End with a line `VERDICT: yes` or `VERDICT: no`."
)


class Judge:
    """`votes` verdicts a problem by a model; without a majority for yes it goes."""

    uses_model = True

    def __init__(
        self,
        bench: Bench,
        *,
        model: str = "policy",
        endpoint: str | None = None,
        prompt: str = ASK,
        verdict: str = r"VERDICT:\s*(yes|no)",
        votes: int = 1,
        temperature: float = 0.6,
        max_new_tokens: int = 2048,
    ) -> None:
        """`verdict`: a regular expression whose first group, at its last match, is yes or no."""
        if "{problem}" not in prompt or votes < 1:
            raise RunError("synth: judge.prompt must have a place for {problem}, and votes must be >= 1")
        self.bench, self.model, self.endpoint, self.prompt, self.votes = bench, model, endpoint, prompt, votes
        self.verdict = re.compile(verdict, re.IGNORECASE)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def stream(self, rows: Iterable[Row]) -> Iterator[Row]:
        """A verdict a row, with the votes for yes and those that could be read."""
        writer = self.bench.writer(self.model, self.endpoint)
        sampling = Sampling(self.max_new_tokens, self.temperature, stop_ids=writer.stop_ids)
        for ask, written in writer.stream(map(self._ask, rows), sampling):
            said = [vote for one in written if (vote := self.vote(one.text)) is not None]
            reason = "the judge says nothing" if not said else None if 2 * sum(said) > len(said) else "ill-posed"
            yield {"id": ask.id, "reason": reason, "yes": sum(said), "votes": len(said)}

    def _ask(self, row: Row) -> Ask:
        task = Task(row["id"], self.prompt.replace("{problem}", row["prompt"]))
        return Ask(row["id"], task, self.votes, seed_of(self.bench.seed, row["id"]))

    def vote(self, text: str) -> bool | None:
        """What a text says at its end; None where it says nothing."""
        found = self.verdict.findall(text)
        return None if not found else found[-1].lower() == "yes"
