"""A real browser for tests of the page: Chromium, controlled over two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowUp": (38, ""), "ArrowDown": (40, ""), "ArrowLeft": (37, "")}
KEYS |= {"ArrowRight": (39, ""), "Tab": (9, "\t")}


def browser_path() -> str | None:
    """Return the path of the installed browser."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


class Page:
    """One page of a browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest, self._number, self._session = to_browser, from_browser, b"", 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.problems: list[str] = []  # errors of the console
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> Page:
        """Open an address, and wait until the page has loaded its data."""
        answer = self._call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        return self.wait_until_idle()

    def wait_until_idle(self) -> Page:
        """Wait until the page has no pending requests."""
        until = time.monotonic() + 20
        while not self.js("document.readyState === 'complete' && !document.querySelector('[aria-busy=true]')"):
            assert time.monotonic() < until, f"{self.problems}, {self.js('document.body.innerText')}"
            time.sleep(0.02)
        return self

    def js(self, expression: str) -> Any:
        """Evaluate an expression and return its value as JSON."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> Page:
        """Press keys in order: names of KEYS, or characters."""
        for key in keys:
            code, text = KEYS.get(key, (ord(key[0].upper()), key))
            about = {"key": key, "windowsVirtualKeyCode": code}
            self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self._call("Input.dispatchKeyEvent", type="keyUp", **about)
        return self

    def screen(self, width: int, height: int = 800, *, dark: bool = False, scale: float = 1) -> Page:
        """Set the screen size in CSS pixels and the colour scheme, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def picture(self, path: Path) -> None:
        """Write a screenshot as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(answer["params"])[:500])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browsing(browser: str, profile: Path) -> Iterator[Page]:
    """Start a browser and yield a page."""
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()

    def as_3_and_4() -> None:
        first, second = os.dup(its_input), os.dup(its_output)  # the originals may be 3 or 4
        os.dup2(first, 3)
        os.dup2(second, 4)

    command = [browser, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, preexec_fn=as_3_and_4, pass_fds=(3, 4), stderr=subprocess.DEVNULL) as process:
        os.close(its_input)
        os.close(its_output)
        try:
            yield Page(to_browser, from_browser)
        finally:
            os.close(to_browser)
            os.close(from_browser)
            process.kill()
