"""The two kinds of error a user can act on. Both are printed as one message, without a stack."""

from __future__ import annotations

import re
from collections.abc import Sequence

SECRET = re.compile(r"(sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")
"""What tokens of well-known services look like."""


def without_secrets(text: str) -> str:
    """A message with nothing in it that looks like a token.

    >>> without_secrets("401 for hf_abcdefghijklmnop")
    '401 for (a secret)'
    """
    return SECRET.sub("(a secret)", text)


class RunError(Exception):
    """Something a run needs is missing or broken. The message says what must hold, what was found, and the way out."""


class SharedError(RunError):
    """An error that every rank raises at the same place, so that all can still do something together."""


class RecipeError(RunError):
    """Everything that is wrong with a recipe, collected: one line a problem, each naming the recipe key."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)} in the recipe"
        super().__init__("\n".join([f"{count}:", *(f"  - {problem}" for problem in self.problems)]))


class Preempted(SharedError):
    """The run was asked to leave: every rank raises it at the same place, and a later start goes on from there."""
