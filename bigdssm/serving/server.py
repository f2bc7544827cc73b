"""The HTTP server: connection time limits, and several worker processes on one socket."""

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

METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's variable for metrics of all workers
RETRY_S = 5.0  # before a worker that failed to start is restarted, while others serve
KILLED_AFTER_S = 5.0  # grace period beyond a worker's own timeout
logger = get_logger(__name__)


def run(app: FastAPI, listening: socket.socket, timeout_s: int) -> None:
    """Serve until SIGTERM or SIGINT, then stop within `timeout_s`.

    A request that does not arrive completely within `timeout_s` is answered with 408 and its connection closed.
    """
    config = uvicorn.Config(app, http=_Protocol, ws="none", log_level="error", timeout_graceful_shutdown=timeout_s)
    uvicorn.Server(config).run([listening])


class _Protocol(H11Protocol):
    """One connection with a time limit on requests."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets TCP_NODELAY only on sockets that it opens; without it the body of an answer waits 40 ms for the
        # delayed ACK of the head
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close immediately unless a complete request waits for its answer."""
        if self._is_incomplete():
            self.transport.close()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with a JSON error."""
        self._send_error(400, "this is not an HTTP request")

    @property
    def _timeout_s(self) -> int:
        return self.config.timeout_graceful_shutdown or 0

    def _is_incomplete(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _update_timer(self) -> None:
        """Start the timer of an incomplete request, stop that of a complete one; further data does not extend it."""
        if not self._is_incomplete():
            self._cancel_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._timeout_s, self._on_timeout)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:  # a head, or a part of one, arrived
            self._send_error(408, f"the request did not arrive completely within {self._timeout_s} s")
        self.transport.close()

    def _send_error(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps({"error": message}).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
            answer = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
            for event in (answer, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # drop the answer of a request that is being processed
            self.cycle.disconnected = True
        self.transport.close()


class WorkersFailed(BigDSSMError):
    """A worker ended before it was ready."""


def run_workers(count: int, work: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: int) -> None:
    """Run `work(*arguments, ready)` in `count` processes until SIGTERM or SIGINT, and wait for them.

    `work` and `arguments` must be picklable, as sockets are. `work` calls `ready()` once it serves. A process that ends
    afterwards is restarted; one that ends before, for example while its folders are being replaced, is retried as long
    as others serve. Raises WorkersFailed: a worker ended before it was ready, and no other serves.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stopping = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.set())

    def start() -> tuple[BaseProcess, Event]:
        ready = context.Event()
        process = context.Process(target=_worker, args=(work, (*arguments, ready.set)))
        process.start()
        return process, ready

    workers = [start() for _ in range(count)]
    retry_at = dict[int, float]()  # time of the next start, by index of a worker that failed to start
    try:
        while not stopping.is_set():
            wait([process.sentinel for i, (process, _) in enumerate(workers) if i not in retry_at], timeout=0.5)
            for i, (process, ready) in enumerate(workers):
                if process.is_alive() or stopping.is_set() or time.monotonic() < retry_at.get(i, 0):
                    continue
                if i not in retry_at and not ready.is_set():  # ended before it was ready: restart it later
                    code = process.exitcode
                    if not any(other.is_alive() and serves.is_set() for other, serves in workers):
                        raise WorkersFailed(f"a worker ended with code {code} before it was ready; see above")
                    logger.warning(
                        "worker %s ended with code %s before it was ready, see above; the others keep serving, restart "
                        "in %.0f s", process.pid, code, RETRY_S,
                    )  # fmt: skip
                    retry_at[i] = time.monotonic() + RETRY_S
                    continue
                if retry_at.pop(i, None) is None:  # it has served
                    logger.warning("worker %s ended with code %s; restarting it", process.pid, process.exitcode)
                workers[i] = start()
    finally:
        for process, _ in workers:
            process.terminate()
        until = time.monotonic() + timeout_s + KILLED_AFTER_S
        for process, _ in workers:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _worker(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()  # returns also if the parent is killed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    work(*arguments)
