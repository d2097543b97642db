"""A client of one generator server. Every call has a time limit, and whatever goes wrong is `Lost`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any

import httpx

from rlpost.errors import RunError

CONNECT_S = 5.0
KEY = "RLPOST_SERVER_KEY"


class Lost(Exception):
    """A server did not answer, or not as it should."""


class Replica:
    """One server, as one rank sees it."""

    def __init__(self, url: str, key: str, *, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self.alive = False
        """Whether it may be asked for rollouts, as far as this rank knows."""
        self.boot: str | None = None
        """Which start of the server it was that this rank has last heard of."""
        self.why = "not started yet"
        """Why it is not alive."""
        self.block = 0
        self.workers = 1
        self.lock = RLock()
        """Held while its weights are changed."""
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            trust_env=False,
        )

    def lose(self, why: object) -> None:
        """Ask it for nothing more until it has been given weights anew."""
        self.alive, self.why = False, str(why)

    def state(self, timeout_s: float | None = None) -> dict[str, Any]:
        """What its gate says of itself."""
        found = self._checked(self._call("GET", "/rlpost/state", None, timeout_s))
        self.boot, self.block, self.workers = str(found["boot"]), int(found["block"]), int(found["workers"])
        return found

    def close(self, mode: str) -> bool:
        """Shut its gate; false where its engine is still busy, and this is to be called again."""
        return bool(self.post("/rlpost/close", {"mode": mode})["paused"])

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of each token but the first."""
        logp = self.post("/rlpost/score", {"token_ids": list(token_ids)})["logp"]
        if len(logp) != len(token_ids) - 1:
            raise Lost(f"{self.url} scored {len(logp)} of {len(token_ids) - 1} tokens")
        return [float(one) for one in logp]

    def open(self, version: int) -> None:
        """Let rollouts in."""
        self.post("/rlpost/open", {"version": version})

    def name_weights(self, version: int) -> None:
        """Tell its engine which weights it has; some transfers do not."""
        self.post("/update_weight_version", {"new_version": str(version)})

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of a route."""
        return self._checked(self._call("POST", path, body, None))

    def generate(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of one call for rollouts, to its end; a server that says nothing for `timeout_s` is lost."""
        try:
            with self._http.stream("POST", "/rlpost/generate", json=asked) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    self._checked(response)
                for text in response.iter_lines():
                    line = json.loads(text)
                    if "error" in line:
                        raise RunError(f"generator: the server {self.url} cannot answer a request ({line['error']})")
                    yield line
                    if "end" in line:
                        return
        except (httpx.HTTPError, httpx.StreamError, json.JSONDecodeError) as error:
            raise Lost(self._said(error)) from error
        raise Lost(f"{self.url} ended an answer before its end")

    def shut(self) -> None:
        """Close its connections."""
        self._http.close()

    def _call(self, method: str, path: str, body: Any, timeout_s: float | None) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s or self.timeout_s, connect=min(CONNECT_S, timeout_s or CONNECT_S))
        try:
            return self._http.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise Lost(self._said(error)) from error

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise RunError(
                f"generator.servers: {self.url} must know the key of this run ({KEY} differs): set the same for both"
            )
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RunError(
                f"generator.servers: {self.url} must have the routes of rlpost ({response.request.url.path} is not "
                "there): start it with `rlpost serve`, or with --middleware rlpost.generate.server_gate.Gate and "
                "VLLM_SERVER_DEV_MODE=1"
            )
        if response.status_code != httpx.codes.OK:
            raise Lost(f"{self.url} answered {response.status_code}: {response.text[:300]}")
        try:
            found = response.json()
        except json.JSONDecodeError as error:
            raise Lost(self._said(error)) from error
        if not isinstance(found, dict):
            raise Lost(f"{self.url} answered no mapping")
        return found

    def _said(self, error: Exception) -> str:
        silent = isinstance(error, httpx.ReadTimeout)
        return f"{self.url} {'said nothing for too long' if silent else f'failed ({type(error).__name__}: {error})'}"
