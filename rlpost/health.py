"""What goes wrong step after step: gradients that are not finite, and steps that find nothing to train on."""

from __future__ import annotations

from collections.abc import Mapping

from rlpost.cluster_recipe import Failure


class Health:
    """Counts in a row; every rank sees the same figures, so all come to the same result."""

    def __init__(self, failure: Failure) -> None:
        self.failure, self.lr_key = failure, ""
        self.empty_steps = 0
        self.skipped_in_a_row = 0
        self._was_short = False

    def see(
        self, step: int, logged: Mapping[str, float], *, skipped_in_a_row: int, lr_key: str = "engine.lr"
    ) -> str | None:
        """Look at the figures of a step, and at those of the model, by its key, whose gradients failed most often.

        Returns what to say of it where it is worth a line.
        """
        self.lr_key = lr_key
        said = []
        if skipped_in_a_row > self.skipped_in_a_row:
            said.append(f"the gradient was not finite, and the policy is as it was ({skipped_in_a_row} in a row)")
        self.skipped_in_a_row = skipped_in_a_row
        self.empty_steps = 0 if logged.get("groups/trained", 0.0) else self.empty_steps + 1
        short = logged.get("groups/missing", 0.0)
        if short and not self._was_short:
            said.append(f"{short:.0f} groups were missing after the last wave (algorithm.groups.max_waves)")
        self._was_short = bool(short)
        return f"step {step + 1}: {'; '.join(said)}" if said else None

    def broken(self) -> str | None:
        """Why the run must not go on; None while it may."""
        if self.skipped_in_a_row >= self.failure.gradients:
            return (
                f"the gradient must be finite (it was not in {self.skipped_in_a_row} optimizer steps in a row, "
                f"the bound of failure.gradients): lower {self.lr_key}, or check the rewards for extreme values"
            )
        if self.failure.empty_steps and self.empty_steps >= self.failure.empty_steps:
            return (
                f"a step must find groups to train on ({self.empty_steps} in a row found none, the bound of "
                "failure.empty_steps): rewards never differed inside a group; see reward/solved_frac, and choose "
                "easier or harder tasks, a larger sampling.group_size, or algorithm.groups.without_spread=keep"
            )
        return None
