"""Answers with a Python sandbox: `<python>print(6*7)</python>` is followed by `<output>42</output>`."""

from __future__ import annotations

from typing import Literal

from rlpost.sandbox import Limits, Ran, run
from rlpost.talk import Talk


async def python(
    talk: Talk,
    *,
    begin: str = "<python>",
    end: str = "</python>",
    result: str = "<output>{}</output>",
    max_calls: int = 4,
    max_chars: int = 1000,
    seconds: float = 5.0,
    memory_mib: int = 512,
    sandbox: Literal["namespaces", "limits"] = "namespaces",
) -> None:
    """What the policy writes between `begin` and `end` runs as a program of its own, whose output is put behind it.

    Where it fails, the last line of what it complains of stands there. A program knows nothing of the one before it.
    """
    limits = Limits(seconds=seconds, memory_mib=memory_mib, namespaces=sandbox == "namespaces")
    for _ in range(max_calls):
        turn = await talk.generate(stop=end)
        if turn.stop is None:
            return
        _, begun, program = turn.text.partition(end)[0].rpartition(begin)
        if not begun:
            talk.append(result.format(f"no {begin}"), error=True)
            continue
        ran = await talk.run(run, program, "", limits, seconds=None)  # the sandbox keeps the time
        talk.append(result.format(said(ran)[:max_chars]), error=ran.status != 0)
    await talk.generate()


def said(ran: Ran) -> str:
    """What a model is told of a program.

    >>> said(Ran(0, "42\\n", "", "", timed_out=False))
    '42'
    >>> said(Ran(1, "", "Traceback\\nKeyError: 'a'\\n", "", timed_out=False))
    "KeyError: 'a'"
    """
    if ran.timed_out:
        return f"{ran.output.strip()}\ntoo slow".strip()
    complaint = (ran.errors.strip().splitlines() or ["no output, and an error"])[-1] if ran.status else ""
    return f"{ran.output.strip()}\n{complaint}".strip()
