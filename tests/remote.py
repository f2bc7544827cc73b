"""An HTTP server of files, with faults."""

from __future__ import annotations

import http.server
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.conftest import QuietServer


class Server:
    """Serves a folder on 127.0.0.1 with byte ranges; `fault(handler, content)` may answer instead, returning True."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.fault: Callable[[http.server.BaseHTTPRequestHandler, bytes], bool] | None = None
        self.requests: Counter[str] = Counter()  # GETs by path
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                served.requests[path] += self.command == "GET"
                file = served.folder / path.lstrip("/")
                if not file.is_file():
                    return answer(self, 404, b"")
                content, status = file.read_bytes(), 200
                if served.ranges and (wanted := self.headers.get("Range")):
                    first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                    if first >= len(content):
                        return answer(self, 416, b"")
                    content, status = content[first : last + 1], 206
                if served.fault is None or not served.fault(self, content):
                    answer(self, status, content)

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def every(self, n: int, fault: Callable[[http.server.BaseHTTPRequestHandler, bytes], None]) -> None:
        """Answer requests with `fault`, except every n-th one for the same bytes; n = 0: all requests."""
        counts: defaultdict[tuple[str, ...], Iterator[int]] = defaultdict(lambda: itertools.count(1))

        def strike(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> bool:
            if fault is short and handler.command == "HEAD":
                return False
            if n and next(counts[handler.command, handler.path, handler.headers.get("Range", "")]) % n == 0:
                return False
            fault(handler, content)
            return True

        self.fault = strike


def answer(handler: http.server.BaseHTTPRequestHandler, status: int, content: bytes, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


def short(handler, content: bytes) -> None:
    """Send half of the bytes as if complete."""
    answer(handler, 206, content[: len(content) // 2])
