"""A headless Chromium that tests drive through its DevTools protocol: windows of any width, light and dark, keys."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

PAGE = Path(__file__).parent / "report_page.js"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def found() -> str | None:
    """The browser's path, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser that is ended with the block."""

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.errors: list[str] = []
        """Exceptions and errors that the page's console got."""
        self.requests: list[str] = []
        """What the page asked for."""
        self._number = 0

    def __enter__(self) -> Browser:
        path = found()
        assert path is not None
        command = [path, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack = ExitStack()
        self._socket = self._stack.enter_context(connect(self._address(), max_size=None))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    def _address(self) -> str:
        port_file = self.profile / "DevToolsActivePort"
        for _ in range(600):
            if port_file.exists() and (lines := port_file.read_text().splitlines()):
                break
            assert self._process.poll() is None, "the browser ended at once"
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=30) as answer:
            pages = json.load(answer)
        return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer; events on the way are taken note of."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def window(self, width: int, height: int, *, dark: bool = False) -> None:
        """Another size and colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def open(self, file: Path) -> float:
        """Go to a report and wait until it is drawn; the seconds from the navigation on, by the page's own clock."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=file.resolve().as_uri())
        ready = self.wait("document.documentElement?.dataset.ready")
        self.run("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => go(1))))")
        return float(ready) / 1000

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def ask(self, script: str) -> Any:
        """The value of an expression that may use the functions of `report_page.js`."""
        return self.run(f"(() => {{ {PAGE.read_text(encoding='utf-8')}\nreturn {script}; }})()")

    def wait(self, script: str, *, seconds: float = 120) -> Any:
        """The value of an expression as soon as it is one that holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.ask(script):
                return value
            time.sleep(0.05)
        raise AssertionError(f"the page never had {script}; {self.errors}")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def choose(self, label: str, value: Any) -> None:
        """Give the field with this label a value, as a person does."""
        field = f"document.querySelector({json.dumps(f'[aria-label={json.dumps(label)}]')})"
        events = "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind));"
        self.run(f"(() => {{ const field = {field}; field.value = {json.dumps(value)}; {events} }})()")

    def picture(self, file: Path | None = None) -> bytes:
        """The window as PNG."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if file is not None:
            file.write_bytes(data)
        return data
