"""One reward on some rollouts: every answer, delay and failure becomes a verdict. Runs wherever a reward runs."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal

from rlpost.deadline import TimeOver, deadline
from rlpost.types import Group, Rollout, Score, Verdict

POLL_S = 0.5
"""How often somebody who waits for rewards looks whether the run has been asked to leave."""
Shape = Literal["rollout", "rollouts", "group"]
"""What a reward is a function of; of several it returns as many."""


def shape_of(call: Callable[..., Any]) -> Shape:
    """What a reward is a function of, by the annotation of its first parameter, else by that parameter's name.

    >>> def a(rollout: Rollout): ...
    >>> def b(answers: list[Rollout]): ...
    >>> def c(group): ...
    >>> shape_of(a), shape_of(b), shape_of(c)
    ('rollout', 'rollouts', 'group')
    """
    first = next(iter(inspect.signature(call).parameters.values()), None)
    if first is None:
        return "rollout"
    if first.annotation is not inspect.Parameter.empty:
        text = first.annotation.__name__ if isinstance(first.annotation, type) else str(first.annotation)
        if "[" in text or "[" in str(first.annotation):
            return "rollouts"
        return "group" if text.rpartition(".")[2] == "Group" else "rollout"
    return "rollouts" if first.name == "rollouts" else "group" if first.name == "group" else "rollout"


def is_async(call: Callable[..., Any]) -> bool:
    """Whether a reward waits for something: `async def`, or an object with an async `__call__`."""
    while isinstance(call, partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


def judge(
    call: Callable[..., Any],
    shape: Shape,
    rollouts: Sequence[Rollout],
    *,
    seconds: float | None,
    group: Group | None = None,
    poll: Callable[[], object] = bool,
) -> list[Verdict]:
    """A verdict for each rollout, whatever the reward does; `seconds` is the time for one rollout.

    `poll` is called now and then, and what it raises ends the judging. What only a process that is killed can end (a C
    function that does not return) is not ended here.
    """
    if shape == "rollout":
        found = [_attempt(partial(call, rollout), call, seconds, poll) for rollout in rollouts]
        if any(inspect.isawaitable(one) for one in found):
            return asyncio.run(_wait_for_all(call, found, seconds, poll))
        return found
    subject = group if shape == "group" else list(rollouts)
    whole = None if seconds is None else seconds * max(len(rollouts), 1)
    found = _attempt(partial(call, subject), call, whole, poll, many=len(rollouts))
    if inspect.isawaitable(found):
        [found] = asyncio.run(_wait_for_all(call, [found], whole, poll, many=len(rollouts)))
    return found if isinstance(found, list) else [found] * len(rollouts)


def _attempt(
    work: Callable[[], Any],
    call: Callable[..., Any],
    seconds: float | None,
    poll: Callable[[], object],
    *,
    many: int | None = None,
) -> Any:
    """What `work` returns as a verdict, or as a list of `many`; still awaitable where it is."""
    poll()
    started = time.perf_counter()
    try:
        with deadline(seconds):
            answer = work()
    except BaseException as error:  # a user's code may raise anything
        return _failure(error, call, seconds, time.perf_counter() - started)
    return answer if inspect.isawaitable(answer) else _read(answer, time.perf_counter() - started, many)


async def _wait_for_all(
    call: Callable[..., Any],
    found: list[Any],
    seconds: float | None,
    poll: Callable[[], object],
    *,
    many: int | None = None,
) -> list[Any]:
    async def one(answer: Awaitable[Any] | Verdict) -> Any:
        if not inspect.isawaitable(answer):
            return answer
        started = time.perf_counter()
        try:
            async with asyncio.timeout(seconds) as limit:
                value = await answer
        except BaseException as error:  # as above
            cause = TimeOver().with_traceback(error.__traceback__) if limit.expired() else error
            return _failure(cause, call, seconds, time.perf_counter() - started)
        return _read(value, time.perf_counter() - started, many)

    judged = asyncio.gather(*map(one, found))
    while not judged.done():
        poll()
        await asyncio.wait([judged], timeout=POLL_S)
    return list(judged.result())


def _read(answer: Any, seconds: float, many: int | None) -> Any:
    """What a reward returned, as a verdict, or as many as were asked for."""
    if many is None:
        return _verdict(answer, seconds)
    if isinstance(answer, str | bytes) or not hasattr(answer, "__iter__"):
        return Verdict(None, "error", note=f"returned {answer!r:.80}, where it must return a value for each rollout")
    answers = list(answer)
    if len(answers) != many:
        return Verdict(None, "error", note=f"returned {len(answers)} values for {many} rollouts")
    return [_verdict(one, seconds / max(many, 1)) for one in answers]


def _verdict(answer: Any, seconds: float) -> Verdict:
    score = answer if isinstance(answer, Score) else Score(answer)
    numbers = [*score.parts.values(), *([] if score.value is None else [score.value])]
    if any(not isinstance(number, Real) or not math.isfinite(float(number)) for number in numbers):
        note = f"returned {answer!r:.80}, where it must return a finite number, None or a Score of these"
        return Verdict(None, "error", note=note, seconds=seconds)
    parts = {str(name): float(part) for name, part in score.parts.items()}
    value = None if score.value is None else float(score.value)
    if value is None or score.unparsable:
        return Verdict(value, "unparsable", parts, score.note, seconds)
    return Verdict(value, "ok" if value >= 1 else "wrong", parts, score.note, seconds)


def _failure(error: BaseException, call: Callable[..., Any], limit: float | None, seconds: float) -> Verdict:
    if isinstance(error, KeyboardInterrupt):
        raise error
    place = place_of(call, error)
    if isinstance(error, TimeOver):
        return Verdict(None, "timeout", note=f"took longer than {limit:g} s, and was at {place}", seconds=seconds)
    if isinstance(error, MemoryError):
        return Verdict(None, "crash", note=f"ran out of memory at {place}", seconds=seconds)
    if isinstance(error, SystemExit):
        return Verdict(None, "crash", note=f"ended its process (exit {error.code}) at {place}", seconds=seconds)
    text = " ".join(str(error).split())[:300]
    return Verdict(None, "error", note=f"raised {type(error).__name__}: {text} at {place}", seconds=seconds)


def place_of(call: Callable[..., Any], error: BaseException) -> str:
    """The last line of the reward's own file that an error came through."""
    source = source_of(call)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    return f"{source}:{frames[-1].lineno}" if frames else source


def source_of(call: Callable[..., Any]) -> str:
    """The file that the reward's function, or the class of a callable object, stands in."""
    while isinstance(call, partial):
        call = call.func
    function = inspect.unwrap(call) if inspect.isroutine(call) else type(call).__call__
    code = getattr(function, "__code__", None)
    return code.co_filename if code is not None else repr(call)
