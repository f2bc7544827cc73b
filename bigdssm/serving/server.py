"""The HTTP server under the application: a client may take only so long, and a stop waits for none that is late."""

from __future__ import annotations

import asyncio
import json
import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


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
