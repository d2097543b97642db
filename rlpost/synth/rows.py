"""What the stages hand on: rows of plain JSON, and what can be read from them.

A row of `sample` is a problem: `id`, `prompt`, `seed`, `finish`. `distil` adds `solutions`, each with `text`,
`reasoning`, `answer` and `finish`. A filter adds nothing to it: its own rows are verdicts, `id` and `reason`, which is
null for what stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rewards._numbers import as_number
from rewards.boxed_answer import last_box
from rlpost.errors import RunError
from rlpost.types import Rollout, Task

Row = dict[str, Any]


def normal(answer: str) -> str:
    """Answers that are the same text or the same number become one text.

    >>> normal(" $1,000.0 "), normal("x + 1")
    ('1000', 'x + 1')
    """
    text = " ".join(answer.strip().strip("$ ").split())
    number = as_number(text)
    return text if number is None else f"{number.normalize():f}"


def consensus(solutions: Sequence[Mapping[str, Any]]) -> tuple[str | None, int, float]:
    """The answer that most solutions give, which solution gives it first, and their share of all; a tie has none.

    >>> consensus([{"answer": "7"}, {"answer": "8"}, {"answer": "8.0"}])
    ('8', 1, 0.6666666666666666)
    >>> consensus([{"answer": "7"}, {"answer": None}, {"answer": "8"}])
    (None, 0, 0.3333333333333333)
    """
    found = [None if one["answer"] is None else normal(one["answer"]) for one in solutions]
    ranked = Counter(answer for answer in found if answer is not None).most_common(2)
    if not ranked:
        return None, 0, 0.0
    answer, count = ranked[0]
    share = count / len(found)
    if len(ranked) > 1 and ranked[1][1] == count:
        return None, 0, share
    first = found.index(answer)
    return solutions[first]["answer"], first, share


def answer_of(text: str, how: str) -> str | None:
    r"""The final answer in a text: `boxed`, or the first group of a regular expression at its last match.

    >>> answer_of(r"so \boxed{7}", "boxed"), answer_of("1+1=2;#2", "#(.+)"), answer_of("hm", "#(.+)")
    ('7', '2', None)
    """
    if how == "boxed":
        return last_box(text).strip() or None
    last = None
    for last in re.finditer(how, text):  # noqa: B007
        pass
    if last is None:
        return None
    return (last.group(1 if last.re.groups else 0) or "").strip() or None


def check_answer_rule(how: str, where: str) -> None:
    """Raise where it is neither `boxed` nor a regular expression."""
    if how == "boxed":
        return
    try:
        re.compile(how)
    except re.error as error:
        raise RunError(f"{where} must be `boxed` or a regular expression ({error} in {how!r})") from None


def rollout_of(task: Task, text: str, finish: str) -> Rollout:
    """A text as a reward sees it."""
    return Rollout(
        task=task,
        group=0,
        prompt_ids=(),
        sampled_prompt_ids=(),
        token_ids=(),
        behavior_logp=(),
        finish_reason="stop" if finish == "stop" else "length",
        version=-1,
        text=text,
    )
