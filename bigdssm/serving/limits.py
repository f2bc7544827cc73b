"""Middleware that validates Host and size of requests, and error responses."""

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
    """Rejects requests with a foreign Host, a chunked body, or more than MOST_BYTES."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a valid request; answer others with an error."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        error = self._header_error(Headers(scope=scope))
        body = bytearray()  # counted on arrival: Content-Length may be wrong
        more = error is None
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BYTES:
                error, more = (413, f"the request is larger than the limit of {MOST_BYTES} bytes"), False
        if error is not None:
            return await error_response(*error, {"Connection": "close"})(scope, receive, send)
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def received() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, received, send)

    def _header_error(self, headers: Headers) -> tuple[int, str] | None:
        """Return status and message if the headers are invalid."""
        host, length = headers.get("host", ""), headers.get("content-length")
        if self._hosts is not None and not _is_allowed(host, self._hosts):
            return 400, f"the host {host[:100]!r} is not allowed; start the server with --allow-host NAME"
        if "transfer-encoding" in headers:
            if length is not None:
                return 400, "the request has both Content-Length and Transfer-Encoding"
            return 411, "the request has no Content-Length; send the query in one piece"
        if length is not None and not (length.isdecimal() and len(length) < 20):
            return 400, f"Content-Length is {length[:100]!r}, needs a number"
        if int(length or 0) > MOST_BYTES:
            return 413, f"the request has {length} bytes, needs at most {MOST_BYTES}"
        return None


def _is_allowed(host: str, hosts: set[str]) -> bool:
    """Return whether a Host header, with or without port, is a loopback name or in `hosts`."""
    name = PORT.sub("", host.lower()).removesuffix(".")
    name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if name == "localhost" or name in hosts:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or bool(hosts & ANY_ADDRESS)


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return a JSON error response with a one-line message."""
    # The message may quote a lone surrogate of the request (JSON's "\\ud800"), which UTF-8 cannot encode.
    line = " ".join(message.encode("utf-8", "backslashreplace").decode().splitlines())
    return JSONResponse({"error": line}, status, headers)


def validation_message(error: RequestValidationError) -> str:
    """Return a message about the first validation error."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the request is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))[:100] or "the request"
    got = "" if isinstance(first.get("input"), bytes | dict | list | None) else f", got {str(first['input'])[:60]!r}"
    return f"{where}: {first['msg']}{got}"
