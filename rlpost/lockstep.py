"""Answers over several calls of the generator, all of a batch in step.

A round waits until every talk that has not ended waits for the policy, and then asks the generator once for all of them
(once for each set of stop texts), so what a batch holds does not depend on which tool was quick. The event loop stands
still while the generator works. No collectives: it may run in a thread beside the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError
from rlpost.judging import place_of
from rlpost.preempt import preemption
from rlpost.talk import Talk, Wish
from rlpost.types import Request, Rollout, Sampling

if TYPE_CHECKING:
    from rlpost.generate.base import Generator, Whole
    from rlpost.render import Renderer

TOOLS = 16
"""Tools that run at once, in threads."""
POLL_S = 0.5
"""How often the wait for tools looks whether the run has been asked to leave."""


def in_turns(
    generator: Generator,
    renderer: Renderer,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    whole: Whole | None = None,
) -> list[Rollout]:
    """All rollouts of all requests, in their order, each led by the function `sampling.rollout`."""
    assert sampling.rollout is not None
    with asyncio.Runner() as runner:
        table = runner.run(_seated(sampling.rollout, renderer, requests, replace(sampling, rollout=None)))
        while runner.run(table.settled()):
            table.tell(whole)
            table.ask(generator)
        table.tell(whole)
    return [rollout for group in table.ended for rollout in group or ()]


async def _seated(
    function: Callable[[Any], Awaitable[None]], renderer: Renderer, requests: Sequence[Request], sampling: Sampling
) -> Table:
    return Table(function, renderer, requests, sampling)


class Table:
    """The talks of a batch, each in a task of the event loop that it is made in."""

    def __init__(
        self,
        function: Callable[[Any], Awaitable[None]],
        renderer: Renderer,
        requests: Sequence[Request],
        sampling: Sampling,
    ) -> None:
        self.function, self.sampling = function, sampling
        self.ended: list[list[Rollout] | None] = [None] * len(requests)
        """The rollouts of each request whose talks have all ended."""
        tools = asyncio.Semaphore(TOOLS)
        self._groups = [
            [Talk(request, place, renderer, sampling, tools=tools) for place in range(request.n)]
            for request in requests
        ]
        self._talks = [talk for group in self._groups for talk in group]
        self._moved = asyncio.Event()
        self._tasks = {id(talk): asyncio.create_task(self._lead(talk)) for talk in self._talks}

    async def settled(self) -> bool:
        """Whether any talk waits for the policy, once all the others have ended.

        The watchdog sees a tool that never ends: nothing is said to get on meanwhile.
        """
        while not all(self._has_ended(talk) or talk.wish is not None for talk in self._talks):
            self._moved.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._moved.wait()
            if preemption.is_due():
                preemption.poll()
        for talk in self._talks:
            if talk.error is not None:
                raise _failure(self.function, talk) from talk.error
        return bool(self._waiting())

    def ask(self, generator: Generator) -> None:
        """Have the generator grant what is wished for: one call for each set of stop texts."""
        by_stop: dict[tuple[str, ...], list[tuple[Talk, Wish]]] = {}
        for talk, wish in self._waiting():
            by_stop.setdefault(wish.stop, []).append((talk, wish))
        for stop, pairs in by_stop.items():
            runs = list(_runs(pairs))
            asked = [talks[0].asks(limit, len(talks)) for talks, limit in runs]
            answers = generator.generate(asked, replace(self.sampling, stop=stop))
            for (talk, _), answer in zip(pairs, answers, strict=True):
                talk.take(answer)

    def tell(self, whole: Whole | None) -> None:
        """Make the rollouts of the requests whose last talk has ended, and tell of them."""
        for i, group in enumerate(self._groups):
            if self.ended[i] is None and all(map(self._has_ended, group)):
                self.ended[i] = rollouts = [talk.rollout() for talk in group]
                if whole is not None:
                    whole(rollouts)

    async def _lead(self, talk: Talk) -> None:
        talk.listen(self._moved.set)
        try:
            await self.function(talk)
            if talk.finish is None:
                raise RuntimeError("it returned without having awaited talk.generate")
        except BaseException as error:  # a user's code may raise anything
            talk.error = error
            if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
                raise
        finally:
            self._moved.set()

    def _has_ended(self, talk: Talk) -> bool:
        return talk.error is not None or self._tasks[id(talk)].done()

    def _waiting(self) -> list[tuple[Talk, Wish]]:
        pairs = [(talk, talk.wish) for talk in self._talks if not self._has_ended(talk)]
        return [(talk, wish) for talk, wish in pairs if wish is not None]


def _runs(pairs: Sequence[tuple[Talk, Wish]]) -> Iterator[tuple[list[Talk], int]]:
    """(talks, limit) that have the same prompt and follow each other in a request: a generator may share its work."""

    def key(numbered: tuple[int, tuple[Talk, Wish]]) -> Any:
        i, (talk, wish) = numbered
        return (id(talk), wish.limit) if talk.turns else (id(talk.request), wish.limit, talk.place - i)

    for (_, limit, *_), run in groupby(enumerate(pairs), key):
        yield [talk for _, (talk, _) in run], limit


def _failure(function: Callable[..., Any], talk: Talk) -> RunError:
    error = talk.error
    assert error is not None
    text = " ".join(str(error).split())[:300]
    name = getattr(getattr(function, "func", function), "__name__", "?")
    return RunError(
        f"rollout `{name}` must lead every answer to its end, and raised {type(error).__name__}: {text} at "
        f"{place_of(function, error)} for task {talk.task.key}, whose answer so far ends {talk.text[-80:]!r}: mend it, "
        "or catch there what a tool may raise, and tell the model with talk.append(..., error=True)"
    )
