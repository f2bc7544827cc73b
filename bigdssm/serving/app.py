"""The HTTP API and the page.

GET  /                    the page
GET  /api/about           model, index, query features
GET  /api/users           some users to choose from
POST /api/search          a request, see Ask and docs/serving.md
GET  /api/similar?key=K   the nearest documents of a document
GET  /metrics             what is counted, for Prometheus
GET  /healthz, /readyz    whether the process lives, and whether it takes queries

GET  /openapi.json        all of it, for programs

What cannot be answered comes back as 4xx with {"error": "one sentence"}; 503 where too many wait. A page of another
site can have its own name lead to this machine and ask as if it were ours (DNS rebinding): so a request's Host has to
be one of ours.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigdssm.errors import BigDSSMError, DataError
from bigdssm.retrieval.index import Document
from bigdssm.retrieval.request import Event, Request
from bigdssm.serving.batching import Overloaded
from bigdssm.serving.live import Answering, Live
from bigdssm.serving.metrics import Counted, Metrics
from bigdssm.serving.searcher import Folders, Searcher

PAGE = Path(__file__).with_name("page.html")
MOST_DOCUMENTS, MOST_CHARACTERS, MOST_VALUES, MOST_BYTES = 100, 10_000, 1000, 1 << 20
PATHS = frozenset(
    ["/", "/api/about", "/api/users", "/api/search", "/api/similar", "/metrics", "/healthz", "/readyz", "/openapi.json"]
)
PORT, ANY_ADDRESS = re.compile(r":[0-9]*$"), {"0.0.0.0", "::", ""}
ShortText = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]  # no text that reads like one
Value = (
    ShortText | Number | Annotated[list[ShortText | Number], Field(max_length=MOST_VALUES)] | None
)  # of a feature, as its type reads it
Top = Annotated[int, Field(ge=1, le=MOST_DOCUMENTS)]


class AskEvent(BaseModel):
    """Something that the asking user did."""

    model_config = ConfigDict(extra="forbid")

    item: ShortText = Field(description="a document, by its key or its display name; an unknown one is skipped")
    time: Number | None = Field(None, description="in the unit of now; without, events are given oldest first")
    action: ShortText | None = Field(None, description="what was done; no model reads it yet")


class Ask(BaseModel):
    """A request: what is known of who asks, and which documents may answer."""

    model_config = ConfigDict(extra="forbid")

    user: ShortText | None = Field(None, description="a user of the dataset, whose features and events come first")
    document: ShortText | None = Field(None, description="the key of the document that the query is")
    features: dict[ShortText, Value] | None = Field(None, max_length=MOST_VALUES, description="values of features")
    events: list[AskEvent] | None = Field(None, max_length=MOST_VALUES, description="what the user did since")
    now: Number | None = Field(None, description="events after it are not known yet")
    filter: ShortText | None = Field(None, description="which documents may be found, as in year >= 1990")
    exclude_seen: StrictBool | None = Field(None, description="whether documents of events stay out; none: as trained")
    top: Top = 10

    def request(self) -> Request:
        """Return it as the library takes it."""
        events = None if self.events is None else [Event(**event.model_dump()) for event in self.events]
        return Request(**{**dict(self), "events": events})


class Refusal(BaseModel):
    """Why a request is not answered."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "A query that cannot be asked, or a request that is none of ours"},
    404: {"model": Refusal, "description": "An unknown user, document or page"},
    408: {"model": Refusal, "description": "A request that took too long to arrive"},
    411: {"model": Refusal, "description": "A request in chunks"},
    413: {"model": Refusal, "description": "A request that is too large"},
    422: {"model": Refusal, "description": "A request of another form"},
    503: {"model": Refusal, "description": "Too many wait; ask again later"},
}


def make_app(
    searcher: Searcher, *, cache_size: int = 10_000, at_once: int = 32, hosts: Sequence[str] | None = None,
    folders: Folders | None = None, look_s: float = 1.0,
) -> FastAPI:  # fmt: skip
    """Return the application that answers with `searcher`; cache_size 0 keeps no answers.

    With `folders` it takes up what is put in their place, which it looks for every `look_s` seconds. Requests are to be
    addressed to a loopback name or to one of `hosts`, of which 0.0.0.0 or :: stands for any address (not any name);
    None does not look at whom they are addressed to.
    """
    metrics = Metrics()
    live: Live | None = None

    def answering() -> Answering:
        if live is None:
            raise Overloaded("the server is starting or stopping")
        return live.now

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal live
        live = made = Live(searcher, metrics, at_once, cache_size, folders, look_s)
        watching = asyncio.create_task(made.watch())
        yield
        live = None
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await made.end()

    app = FastAPI(title="bigdssm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.add_middleware(_Gate, hosts=hosts)
    app.add_middleware(Counted, metrics=metrics, paths=PATHS)
    page = PAGE.read_text(encoding="utf-8")

    @app.exception_handler(BigDSSMError)
    async def refused(request: HTTPRequest, error: BigDSSMError) -> JSONResponse:
        return _refuse(404 if isinstance(error, DataError) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        return _refuse(422, _sentence(error))

    @app.exception_handler(HTTPException)
    async def no_such_page(request: HTTPRequest, error: HTTPException) -> JSONResponse:
        return _refuse(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)

    @app.exception_handler(Overloaded)
    async def overloaded(request: HTTPRequest, error: Overloaded) -> JSONResponse:
        return _refuse(503, f"{error}; ask again later", {"Retry-After": "1"})

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        return answering().searcher.about()

    @app.get("/api/users")
    async def users() -> list[str]:
        return answering().searcher.users

    @app.post("/api/search")
    async def search(ask: Ask) -> dict[str, Any]:
        started = time.perf_counter()
        key = ask.model_dump_json()
        with answering().asked() as now:
            answer = now.cache.get(key)
            cached = answer is not None
            metrics.cache.labels("hit" if cached else "miss").inc()
            if answer is None:
                # In a thread: looking up users and names may take long, and others are to be answered meanwhile.
                query = await run_in_threadpool(now.searcher.queries.of, ask.request())
                found = await now.batcher(query)
                metrics.unknown_events.inc(len(query.unknown))
                timing = {
                    "encode_ms": found.encode_ms, "search_ms": found.search_ms, "rerank_ms": found.rerank_ms,
                    "batch": found.batch,
                }  # fmt: skip
                known = {"history": now.searcher.seen(query), "unknown_events": len(query.unknown)}
                answer = {"documents": _ranked(found.documents), **known, **timing}
                now.cache.put(key, answer)
        return {**answer, "cached": cached, "total_ms": (time.perf_counter() - started) * 1000}

    @app.get("/api/similar")
    async def similar(key: ShortText, top: Top = 10) -> dict[str, Any]:
        started = time.perf_counter()
        name, documents = await run_in_threadpool(answering().searcher.similar, key, top)
        return {"of": name, "documents": _ranked(documents), "total_ms": (time.perf_counter() - started) * 1000}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def exposition() -> Response:
        return Response(await run_in_threadpool(metrics.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def lives() -> str:
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def takes_queries() -> str:
        if answering().batcher.is_full:
            raise Overloaded("as many queries wait as may")
        return "ok"

    return app


def _ranked(documents: Sequence[Document]) -> list[dict[str, Any]]:
    return [{"rank": rank, **document._asdict()} for rank, document in enumerate(documents, start=1)]


class _Gate:
    """Lets through requests that are addressed to us, with a body of at most MOST_BYTES in one piece."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            return await _refuse(*refusal, {"Connection": "close"})(scope, receive, send)
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


def _refuse(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # What was asked may hold half a character (JSON's "\\ud800"), which no answer can
    return JSONResponse({"error": sentence.encode("utf-8", "backslashreplace").decode()}, status, headers)


def _sentence(error: RequestValidationError) -> str:
    """Return the first thing wrong with a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the request is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))[:100] or "the request"
    got = "" if isinstance(first.get("input"), bytes | dict | list | None) else f", got {str(first['input'])[:60]!r}"
    return f"{where}: {first['msg']}{got}"
