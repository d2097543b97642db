"""Small HTTP servers with the routes of the gate, and accidents: what a client of generator servers must bear.

A server writes the tokens seed % 7 + 2, seed % 5 + 2, ... and then 1. `plan` holds an accident for each call of
`generate`, in order: `die`, `silence`, `cut`, `error`, `nonsense`, `abort`, or `fine`, which it is where the plan ends.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret-of-the-test"


def written(seed: int, begun: int = 0) -> list[int]:
    """What a server writes with this seed."""
    return [*((seed % (7 - i)) + 2 for i in range(begun, 4)), 1]


class FakeServer:
    def __init__(self, *plan: str, silence_s: float = 60.0) -> None:
        self.plan, self.silence_s = list(plan), silence_s
        self.boot, self.version, self.is_open, self.busy = uuid.uuid4().hex, None, False, 0
        self.calls: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.scores = -0.5
        self.refuses: set[str] = set()
        self.dead = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.answer(self, {})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                fake.answer(self, json.loads(self.rfile.read(length)) if length else {})

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def restart(self) -> None:
        """As a new process at the same place."""
        self.boot, self.version, self.is_open, self.dead, self.plan = uuid.uuid4().hex, None, False, False, []

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler: Any, body: dict[str, Any]) -> None:
        path = handler.path
        self.calls.append(path)
        if self.dead:
            handler.close_connection = True
            return
        if handler.headers.get("Authorization") != f"Bearer {KEY}":
            return self.say(handler, {"error": "key"}, 401)
        if path in self.refuses:
            return self.say(handler, {"error": "broken"}, 500)
        if path == "/rlpost/generate":
            return self.generate(handler, body)
        told = {"boot": self.boot, "version": self.version, "open": self.is_open, "busy": 0, "block": 16, "workers": 1}
        if path == "/rlpost/close":
            self.is_open, told = False, {"paused": True}
        elif path == "/rlpost/score":
            told = {"logp": [self.scores] * (len(body["token_ids"]) - 1)}
        elif path == "/rlpost/open":
            self.version, self.is_open = body["version"], True
        self.say(handler, told)

    def say(self, handler: Any, told: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(told).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def generate(self, handler: Any, body: dict[str, Any]) -> None:
        accident = self.plan.pop(0) if self.plan else "fine"
        self.asked.append(body)
        if accident == "error":
            return self.say(handler, {"error": "broken"}, 500)
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        while not (self.is_open and (self.version or 0) >= body["version"]):
            self.line(handler, {})
            time.sleep(0.02)
        self.line(handler, {"entered": self.version})
        half = len(body["rollouts"]) // 2
        for place, (_, begun, seed, max_tokens) in enumerate(body["rollouts"]):
            if place == half and accident in ("die", "silence", "cut", "nonsense"):
                return self.fail(handler, accident)
            tokens = written(seed or 0, len(begun))[:max_tokens]
            if accident == "abort":
                tokens = tokens[:2]
            told = {"place": place, "tokens": tokens, "logp": [-0.25] * len(tokens), "spans": [[0, self.version]]}
            self.line(handler, told | {"finish": "abort" if accident == "abort" else "stop"})
        self.line(handler, {"end": len(body["rollouts"])})

    def fail(self, handler: Any, accident: str) -> None:
        if accident == "silence":
            time.sleep(self.silence_s)
        elif accident == "nonsense":
            self.line(handler, {"place": 999, "tokens": [1], "logp": [], "spans": [], "finish": "stop"})
        elif accident == "cut":
            handler.wfile.write(b'{"place": 0, "tok')
        self.dead = accident == "die"

    def line(self, handler: Any, told: dict[str, Any]) -> None:
        handler.wfile.write(json.dumps(told).encode() + b"\n")
        handler.wfile.flush()
