"""What a rollout function is given: one answer, written in turns by the policy and by tools.

A function of a user's, `async def calculator(talk: Talk, *, max_calls: int = 4) -> None`, asks the policy for text and
puts in what a tool says. `lockstep.py` runs it for all answers of a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlpost.seeds import seed_of
from rlpost.stop_texts import first_stop
from rlpost.types import FinishReason, Request, Rollout, Sampling

if TYPE_CHECKING:
    from rlpost.render import Renderer

T = TypeVar("T")
Writer = Literal["policy", "tool"]

TOOL_S = 60.0
"""How long a tool may take, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of an answer over several calls of the generator, which one writer wrote.

    >>> Turn("policy", "<calc>6*7</calc>", num_tokens=7, stop="</calc>").ended
    'stop'
    """

    writer: Writer
    text: str
    num_tokens: int
    ended: FinishReason = "stop"
    """Of the policy: `length` where it was cut off."""
    stop: str | None = None
    """The text of `Sampling.stop` that ended it; None: an end token, or the length."""
    error: bool = False
    """Of a tool: it says that it failed."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a talk waits for: more text of the policy."""

    stop: tuple[str, ...]
    limit: int
    """Tokens at most."""
    answer: asyncio.Future[Turn]


class Talk:
    """One answer while it is being written."""

    def __init__(
        self, request: Request, place: int, renderer: Renderer, sampling: Sampling, *, tools: asyncio.Semaphore
    ) -> None:
        self.request, self.place = request, place
        self.seed = request.seed + place
        """Belongs to this answer: for a function that rolls dice of its own."""
        self.turns: list[Turn] = []
        self.token_ids: tuple[int, ...] = ()
        self.logp: tuple[float, ...] = ()
        self.finish: FinishReason | None = None
        """How the answer ends if nothing more comes; None: the policy has not been asked yet."""
        self.wish: Wish | None = None
        self.error: BaseException | None = None
        self.task = request.task
        """The problem."""
        self._renderer, self._sampling, self._tools = renderer, sampling, tools
        self._versions: list[tuple[int, int]] = []
        self._known = 0
        self._moved: Callable[[], object] = bool

    @property
    def text(self) -> str:
        """All that was written so far, without the prompt."""
        return self._renderer.decode(self.token_ids)

    @property
    def room(self) -> int:
        """Tokens that still fit: of `max_new_tokens`, which holds for policy and tools together, and the context."""
        whole = min(self._sampling.max_new_tokens, self._renderer.context - len(self.request.prompt_ids))
        return whole - len(self.token_ids)

    async def generate(self, *, stop: str | Sequence[str] = (), max_new_tokens: int | None = None) -> Turn:
        """What the policy writes next, up to an end token, one of the texts in `stop`, or so many tokens.

        Where there is no room left it is an empty turn that ended by `length`.
        """
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in texts or (max_new_tokens is not None and max_new_tokens < 1):
            raise ValueError(
                f"talk.generate must have texts in `stop` and max_new_tokens >= 1 (got {stop!r}, {max_new_tokens})"
            )
        if self.wish is not None:
            raise RuntimeError("talk.generate must be awaited before it is called again: an answer is one sequence")
        if self.room < 1:
            self.finish = "length"
            return Turn("policy", "", 0, ended="length")
        limit = min(self.room, max_new_tokens or self.room)
        wish = self.wish = Wish(texts, limit, asyncio.get_running_loop().create_future())
        self._moved()
        try:
            return await wish.answer
        finally:
            if self.wish is wish:  # it was given up before its round
                self.wish = None

    def append(self, text: str, *, error: bool = False) -> Turn:
        """Put in what a tool says; nothing is trained on it. What does not fit is cut off, and the answer with it.

        `error` says that the tool failed, for the figures.
        """
        ids = self._renderer.text_ids(text) if text else ()
        kept = ids[: self.room]
        if len(kept) < len(ids):
            self.finish, text = "length", self._renderer.decode(kept)
        turn = Turn("tool", text, len(kept), error=error)
        self._add(turn, kept, (math.nan,) * len(kept))
        return turn

    async def run(self, function: Callable[..., T], *args: Any, seconds: float | None = TOOL_S) -> T:
        """What a function returns that may block: in a thread, while the tools of other answers run beside it.

        Raises what it raises, and TimeoutError after so many seconds; its thread is then left to itself.
        """
        async with self._tools, asyncio.timeout(seconds):
            value, error = await _in_thread(function, args)
        if error is not None:
            raise error
        return value

    def listen(self, moved: Callable[[], None]) -> None:
        """Call this when the talk waits for the policy."""
        self._moved = moved

    def asks(self, limit: int, n: int = 1) -> Request:
        """What a generator is asked for, for this talk and those of the same request that follow it.

        The first turn is drawn as a plain answer would be.
        """
        seed, prompt_ids = self.seed, (*self.request.prompt_ids, *self.token_ids)
        if self.turns:
            seed = seed_of(f"{self.seed}:{len(self.turns)}")
        return Request(self.request.group, self.task, prompt_ids, n, seed, limit=limit, known=self._known)

    def take(self, answer: Rollout) -> None:
        """Go on with what the policy wrote, up to the limit and the first stop text, wherever the generator ended."""
        wish = self.wish
        assert wish is not None
        ids, ended, stop = answer.token_ids[: wish.limit], answer.finish_reason, None
        if len(ids) < len(answer.token_ids):
            ended = "length"
        if (found := first_stop(ids, wish.stop, self._renderer.decode)) is not None:
            length, stop = found
            ids, ended = ids[:length], "stop"
        done = len(self.token_ids)
        for first, version in answer.versions:
            if first < len(ids) and (not self._versions or self._versions[-1][1] != version):
                self._versions.append((done + first if self._versions else 0, version))
        turn = Turn("policy", self._renderer.decode(ids), len(ids), ended=ended, stop=stop)
        self._add(turn, ids, answer.behavior_logp[: len(ids)])
        self.finish, self.wish = ended, None
        self._known = len(self.request.prompt_ids) + len(self.token_ids) - 1
        if not wish.answer.done():
            wish.answer.set_result(turn)

    def rollout(self) -> Rollout:
        """The whole answer."""
        assert self.finish is not None
        spans = tuple(self._versions) or -1
        made = self.request.rollout(self.token_ids, self.logp, finish_reason=self.finish, version=spans, text=self.text)
        made.turns = tuple(self.turns)
        return made

    def _add(self, turn: Turn, ids: Sequence[int], logp: Sequence[float]) -> None:
        self.turns.append(turn)
        self.token_ids, self.logp = (*self.token_ids, *ids), (*self.logp, *logp)


def _in_thread(function: Callable[..., Any], args: Sequence[Any]) -> asyncio.Future[tuple[Any, BaseException | None]]:
    """(value, error) of a call in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    found = loop.create_future()

    def tell(result: tuple[Any, BaseException | None]) -> None:
        if not found.done():
            found.set_result(result)

    def work() -> None:
        result: tuple[Any, BaseException | None]
        try:
            result = function(*args), None
        except BaseException as error:  # a user's code may raise anything
            result = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, result)

    threading.Thread(target=work, name="tool", daemon=True).start()
    return found
