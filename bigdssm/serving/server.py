"""The HTTP server: connection time limits, and several worker processes on one socket."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigdssm.errors import BigDSSMError
from bigdssm.utils.log import get_logger


def run(app: FastAPI, listening: socket.socket, timeout_s: int) -> None:
    """Serve until a signal asks to stop, and end at most `timeout_s` later.

    A request has to arrive whole within `timeout_s`, head and body: else it is answered with 408 and closed.
    """
    config = uvicorn.Config(app, http=_Protocol, ws="none", log_level="error", timeout_graceful_shutdown=timeout_s)
    uvicorn.Server(config).run([listening])


class _Protocol(H11Protocol):
    """One connection."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close at once where no whole request waits for its answer."""
        if self._incomplete():
            self.transport.close()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, as everything that cannot be answered is."""
        self._refuse(400, "this is no HTTP request")

    @property
    def _timeout_s(self) -> int:
        return self.config.timeout_graceful_shutdown or 0

    def _incomplete(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _watch(self) -> None:
        """Give a request time from when it may begin, which what trickles in does not make longer."""
        if not self._incomplete():
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self._timeout_s, self._too_late)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._refuse(408, f"the request did not arrive whole within {self._timeout_s} s")
        self.transport.close()

    def _refuse(self, status: int, sentence: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps({"error": sentence}).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
            answer = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
            for event in (answer, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client finds what other workers counted
RETRY_S = 5.0  # until a worker that could not serve is started again, while others serve
KILLED_AFTER_S = 5.0  # what a worker may take longer to end than it says
logger = get_logger(__name__)


class WorkersFailed(BigDSSMError):
    """A worker ended before it could serve."""


def run_workers(number: int, work: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: int) -> None:
    """Run `work(*arguments, ready)` in so many processes until a signal asks to stop; all have ended when it returns.

    Both have to be picklable, as sockets are. `work` calls `ready()` as soon as it can serve: a process that ends
    after that is started again. One that ends before, as when what it opens was replaced in part, is tried again while
    others serve. Raises WorkersFailed: one ended before, and no other serves.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not live through a fork
    stopping = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.set())

    def start() -> tuple[BaseProcess, Event]:
        ready = context.Event()
        process = context.Process(target=_worker, args=(work, (*arguments, ready.set)))
        process.start()
        return process, ready

    workers = [start() for _ in range(number)]
    again = dict[int, float]()  # when to try, by the place of a worker that could not serve
    try:
        while not stopping.is_set():
            wait([process.sentinel for place, (process, _) in enumerate(workers) if place not in again], timeout=0.5)
            for place, (process, ready) in enumerate(workers):
                if process.is_alive() or stopping.is_set() or time.monotonic() < again.get(place, 0):
                    continue
                if place not in again and not ready.is_set():
                    code = process.exitcode
                    if not any(other.is_alive() and serves.is_set() for other, serves in workers):
                        raise WorkersFailed(f"a worker ended with code {code} before it could serve; see above")
                    logger.warning(
                        "worker %s ended with code %s before it could serve, see above; the others serve on, and it is "
                        "started again in %.0f s", process.pid, code, RETRY_S,
                    )  # fmt: skip
                    again[place] = time.monotonic() + RETRY_S
                    continue
                if again.pop(place, None) is None:
                    logger.warning("worker %s ended with code %s; another is started", process.pid, process.exitcode)
                workers[place] = start()
    finally:
        _end([process for process, _ in workers], timeout_s + KILLED_AFTER_S)


def _worker(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()  # however it ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    work(*arguments)


def _end(processes: list[BaseProcess], timeout_s: float) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
