"""What is let in: requests that are addressed to us, of a bounded size; and how the others are refused."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1 << 20
PORT, ANY_ADDRESS = re.compile(r":[0-9]*$"), {"0.0.0.0", "::", ""}


class RequestLimits:
    """Lets through requests that are addressed to us, with a body of at most MOST_BYTES in one piece."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that may come in, and refuse another."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope))
        body = bytearray()  # counted as it arrives, whatever the headers said
        more = refusal is None
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BYTES:
                refusal, more = (413, f"the request is larger than the {MOST_BYTES} bytes that are read"), False
        if refusal is not None:
            return await refuse(*refusal, {"Connection": "close"})(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def received() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, received, send)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        """Return status and sentence where the head of a request is enough to refuse it."""
        host, length = headers.get("host", ""), headers.get("content-length")
        if self._hosts is not None and not _is_ours(host, self._hosts):
            return 400, f"this server is not called {host[:100]!r}; start it with --allow-host NAME to answer to it"
        if "transfer-encoding" in headers:
            if length is not None:
                return 400, "the request has both Content-Length and Transfer-Encoding"
            return 411, "the request has no Content-Length; send the query in one piece"
        if length is not None and not (length.isdecimal() and len(length) < 20):
            return 400, f"Content-Length is {length[:100]!r}, needs a number"
        if int(length or 0) > MOST_BYTES:
            return 413, f"the request has {length} bytes, at most {MOST_BYTES} are read"
        return None


def _is_ours(host: str, hosts: set[str]) -> bool:
    """Return whether a Host header, with or without a port, has a loopback name or one of `hosts`."""
    name = PORT.sub("", host.lower()).removesuffix(".")
    name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if name == "localhost" or name in hosts:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or bool(hosts & ANY_ADDRESS)


def refuse(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer to what cannot be answered, in one line."""
    # What was asked may hold half a character (JSON's "\\ud800"), which no answer can
    said = " ".join(sentence.encode("utf-8", "backslashreplace").decode().splitlines())
    return JSONResponse({"error": said}, status, headers)


def sentence_of(error: RequestValidationError) -> str:
    """Return the first thing wrong with a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the request is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))[:100] or "the request"
    got = "" if isinstance(first.get("input"), bytes | dict | list | None) else f", got {str(first['input'])[:60]!r}"
    return f"{where}: {first['msg']}{got}"
