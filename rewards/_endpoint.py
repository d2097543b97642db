"""Asking a server politely: so many requests a second, again where it is busy, and never twice for the same answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_next_turn: dict[str, float] = {}
"""By server: when the next request of this process may go out."""


class NoAnswer(RuntimeError):
    """The server gave none, after every try."""


async def post(
    url: str,
    body: Mapping[str, Any],
    *,
    per_second: float = 0.0,
    tries: int = 5,
    cache: str | None = None,
    key_from: str = "OPENAI_API_KEY",
) -> Any:
    """The JSON that a server answers with. A key comes from the environment alone, and is never written anywhere.

    Between tries it waits what the server asks for (`Retry-After`), else 0.5, 1, 2 ... s and a little chance.
    """
    import httpx

    question = hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
    if cache and (known := _look_up(cache, question)) is not None:
        return known
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(key_from)) else {}
    said = "no try"
    async with httpx.AsyncClient(timeout=None, verify=url.startswith("https")) as client:  # the reward has a deadline
        for attempt in range(tries):
            await _turn(url, per_second)
            try:
                answer = await client.post(url, json=dict(body), headers=headers)
            except httpx.TransportError as error:
                said, wait_s = f"{type(error).__name__}: {error}", 0.0
            else:
                if answer.status_code == 200:
                    found = answer.json()
                    if cache:
                        _keep(cache, question, found)
                    return found
                said, wait_s = f"status {answer.status_code}: {answer.text[:200]}", _asked_wait(answer.headers)
                if answer.status_code not in RETRIED:
                    break
            if attempt + 1 < tries:
                await asyncio.sleep(max(wait_s, 0.5 * 2**attempt * (1 + random.random() / 4)))
    raise NoAnswer(f"{url} gave no answer ({said}), tried {attempt + 1} times: start the server, or correct url")


async def _turn(url: str, per_second: float) -> None:
    """Wait for one's turn; the rate is shared by the processes that ask."""
    if per_second <= 0:
        return
    gap = int(os.environ.get("RLPOST_JUDGES", "1")) / per_second
    at = max(_next_turn.get(url, 0.0), time.monotonic())
    _next_turn[url] = at + gap
    await asyncio.sleep(at - time.monotonic())


def _asked_wait(headers: Mapping[str, str]) -> float:
    try:
        return min(float(headers.get("retry-after", "0")), 60.0)
    except ValueError:
        return 0.0  # a date


def _look_up(cache: str, question: str) -> Any:
    with _opened(cache) as file:
        row = file.execute("select answer from answers where question = ?", (question,)).fetchone()
    return None if row is None else json.loads(row[0])


def _keep(cache: str, question: str, answer: Any) -> None:
    with _opened(cache) as file:
        file.execute("insert or replace into answers values (?, ?)", (question, json.dumps(answer)))


def _opened(cache: str) -> sqlite3.Connection:
    """A file that several processes may write."""
    path = Path(cache).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(path, timeout=30)
    file.execute("create table if not exists answers (question text primary key, answer text)")
    return file
