"""What the student can do: problems that it solves always teach it nothing, those that it never solves neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlpost.errors import RunError
from rlpost.generate.writers import Ask
from rlpost.synth.bench import Bench
from rlpost.synth.judging import passed_by, task_of
from rlpost.synth.rows import Row, consensus
from rlpost.synth.store import seed_of
from rlpost.types import Sampling


class Policy:
    """`n` answers of the student, judged by the recipe's rewards against the teacher's answer."""

    uses_model = True

    def __init__(
        self,
        bench: Bench,
        *,
        model: str = "policy",
        n: int = 8,
        at_most: float = 1.0,
        solvable: bool = True,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> None:
        """Out goes what is solved with a pass rate of `at_most` or more, and with `solvable` what no answer solves.

        ScaleDiff's own filter is `n: 1, at_most: 1, solvable: false`: out goes what the student answers as the teacher.
        """
        if n < 1 or not 0 < at_most <= 1:
            raise RunError(f"synth.filters: policy needs n >= 1 and at_most in (0, 1] (got {n} and {at_most})")
        self.bench, self.model, self.n, self.at_most, self.solvable = bench, model, n, at_most, solvable
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens or bench.recipe.sampling.max_new_tokens

    def stream(self, rows: Iterable[Row]) -> Iterator[Row]:
        """A verdict a row, with the pass rate."""
        writer, judge = self.bench.writer(self.model), passed_by(self.bench.recipe)
        sampling = Sampling(self.max_new_tokens, self.temperature, stop_ids=writer.stop_ids)
        for ask, written in writer.stream(map(self._ask, rows), sampling):
            flags = [flag for flag in judge(ask.task, written) if flag is not None]
            yield {"id": ask.id, "reason": self._reason(flags), "passes": sum(flags), "tries": len(flags)}

    def _ask(self, row: Row) -> Ask:
        task = task_of(row, answer=consensus(row["solutions"])[0])
        return Ask(row["id"], task, self.n, seed_of(self.bench.seed, row["id"]))

    def _reason(self, flags: list[bool]) -> str | None:
        if not flags:
            return "the reward cannot judge"
        if sum(flags) >= self.at_most * len(flags):
            return "the student solves it"
        return "no answer of the student is right" if self.solvable and not any(flags) else None
