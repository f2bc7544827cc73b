"""HTTP API and search page (FastAPI), with limits on Host and size of requests."""

import asyncio
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import MISSING, asdict, fields
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query
from fastapi import Request as HTTPRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WrapValidator,
    create_model,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigdssm.errors import BigDSSMError, ConfigError, UnavailableError, UnknownKeyError
from bigdssm.features.vector import MAX_DIM
from bigdssm.retrieval.request import HELP, Event, Request, load_json, parse_request, value_type
from bigdssm.serving.live import ActiveSearcher, LiveSearcher, Overloaded
from bigdssm.serving.metrics import Metrics, RequestMetrics
from bigdssm.serving.request_log import RequestLog
from bigdssm.serving.searcher import Folders, Searcher
from bigdssm.stores.base import ScoredDocument
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

MOST_BYTES = 1 << 20
REPEAT_S = 30.0  # after which a fault that continues is logged again
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


PATHS = ("/api/about", "/api/users", "/api/search", "/api/similar", "/api/why", "/api/vector")
SECOND_PREFIX = "/second"
PAGE = Path(__file__).with_name("page.html")
OTHER_PATHS = ("/", "/page.css", "/page.js", "/metrics", "/healthz", "/readyz", "/openapi.json")
COUNTED_PATHS = frozenset([*OTHER_PATHS, *PATHS, *(SECOND_PREFIX + path for path in PATHS)])
# The page has no inline code or style, and loads from this server only.
CONTENT_SECURITY = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
MOST_DOCUMENTS, MOST_CHARACTERS, MOST_ENTRIES = 100, 10_000, 1000
ShortText = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]  # no numeric strings
Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]  # ids, which a float would round
VALUE = (
    f"needs a text of at most {MOST_CHARACTERS} characters, a finite number, a list of at most {MAX_DIM} of these, "
    "or null"
)


def _value(value: Any, check: Any) -> Any:
    """Validate a feature's value, with one message instead of one per union member."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("feature_value", VALUE) from None


Value = Annotated[
    ShortText | Whole | Number | Annotated[list[ShortText | Whole | Number], Field(max_length=MAX_DIM)] | None,
    WrapValidator(_value),
]  # of a feature
Top = Annotated[int, Field(ge=1, le=MOST_DOCUMENTS)]
Excluded = Annotated[Sequence[ShortText], Query(max_length=MOST_ENTRIES, description="keys of no answers; repeatable")]
Integral = BeforeValidator(  # to JSON Schema 10.0 is an integer
    lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
)


def _body(kind: type[Event | Request]) -> Any:
    """Return the JSON body of a declaration of request.py, within the server's limits."""
    served = {
        "str": ShortText,
        "float": Number,
        "bool": StrictBool,
        "int": Annotated[Top, Field(strict=True), Integral],
        "dict[str, Any]": Annotated[dict[ShortText, Value], Field(max_length=MOST_ENTRIES)],
        "list[str]": Annotated[list[ShortText], Field(max_length=MOST_ENTRIES)],
        "list[Event]": Annotated[list[EventBody], Field(max_length=MOST_ENTRIES)] if kind is Request else None,
    }
    declared: dict[str, Any] = {}
    for field in fields(kind):
        value, is_optional = served[value_type(field)], field.default is None
        default = ... if field.default is MISSING else field.default
        declared[field.name] = (
            value | None if is_optional else value,
            Field(default, description=field.metadata[HELP]),
        )
    name = f"{kind.__name__}Body"
    return create_model(name, __config__=ConfigDict(extra="forbid"), **declared)


class EventBody(_body(Event)):  # type: ignore[misc]
    """An interaction of the requesting user, of the kind that the model was trained on."""


class RequestBody(_body(Request)):  # type: ignore[misc]
    """A search request: the query, and constraints on the results."""

    def request(self) -> Request:
        """Convert to the library's Request."""
        return parse_request(self.model_dump(include={field.name for field in fields(Request)}))


class ExplanationBody(RequestBody):
    """A search request, and the result to explain."""

    answer: ShortText = Field(description="key of the result")


class ErrorBody(BaseModel):
    """An error message."""

    error: str


class UniqueKeysRequest(HTTPRequest):
    """An HTTP request whose JSON objects have distinct keys."""

    async def json(self) -> Any:
        """Parse the body. Raises JSONDecodeError: invalid JSON, or a repeated key."""
        try:
            return load_json(await self.body())
        except ConfigError as error:  # FastAPI hides others
            raise JSONDecodeError(str(error), "", 0) from None


class UniqueKeysRoute(APIRoute):
    """A route with `UniqueKeysRequest`."""

    def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handler = super().get_route_handler()

        async def handle(request: HTTPRequest) -> Response:
            return await handler(UniqueKeysRequest(request.scope, request.receive))

        return handle


class FaultLog:
    """Logs faults of the server, which answers do not describe: a new one at once, the same one every REPEAT_S."""

    def __init__(self) -> None:
        self._last = ""
        self._repeat_at = 0.0

    def put(self, path: str, error: BigDSSMError) -> None:
        """Log the fault that a request to `path` failed with."""
        text, now = str(error), time.monotonic()
        if text != self._last or now >= self._repeat_at:
            logger.warning("cannot answer %s: %s", path, text)
            self._last = text
            self._repeat_at = now + REPEAT_S


def api(
    active: Callable[[], ActiveSearcher],
    metrics: Metrics,
    *,
    has_second: bool,
    has_vectors: bool,
    has_users: bool,
    log: RequestLog | None,
) -> APIRouter:
    """Return the routes of one model; `active` returns the current searcher per request.

    `has_vectors` enables /api/vector, `has_users` /api/users, `has_second` is reported to clients. Searches are written
    to `log`. Routes raise Overloaded and BigDSSMError, which the application handles.
    """
    routes = APIRouter(route_class=UniqueKeysRoute)

    @routes.get("/api/about")
    async def about() -> dict[str, Any]:
        about = await run_in_threadpool(active().searcher.about)
        return {**about, "second": has_second, "list_users": has_users}

    @routes.get("/api/users", include_in_schema=has_users)
    async def users() -> list[str]:
        if not has_users:
            raise HTTPException(404, "not enabled; start the server with --list-users")
        return active().searcher.users

    @routes.post("/api/search")
    async def search(body: RequestBody) -> dict[str, Any]:
        started = time.perf_counter()
        key = body.model_dump_json()
        with active().in_use() as current:
            stored = current.cache.get(key)
            cached = stored is not None
            metrics.cache.labels("hit" if cached else "miss").inc()
            if stored is None:
                # In a thread: looking up users and titles may be slow and must not block the event loop.
                query = await run_in_threadpool(current.searcher.queries.of, body.request())
                result = await current.batcher(query)
                metrics.unknown_users.inc(query.unknown_user)
                metrics.unknown_events.inc(len(query.unknown))
                metrics.unknown_excluded.inc(len(query.unknown_excluded))
                answer: dict[str, Any] = {
                    "documents": _ranked(result.documents), "history": current.searcher.seen(query),
                    "unknown_user": query.unknown_user, "unknown_events": len(query.unknown),
                    "unknown_excluded": len(query.unknown_excluded),
                    "encode_ms": result.encode_ms, "search_ms": result.search_ms, "rerank_ms": result.rerank_ms,
                    "batch": result.batch,
                }  # fmt: skip
                stored = answer, query.columns
                current.cache.put(key, stored)
            answer, columns = stored
            if log is not None:
                answer = {**answer, "request": log.put(key, columns, answer["documents"], current.searcher, cached)}
        return {**answer, "cached": cached, "total_ms": _ms_since(started)}

    @routes.get("/api/similar")
    async def similar(key: ShortText, top: Top = 10, exclude: Excluded = ()) -> dict[str, Any]:
        started = time.perf_counter()
        name, documents = await run_in_threadpool(active().searcher.similar, key, top, exclude)
        return {"of": name, "documents": _ranked(documents), "total_ms": _ms_since(started)}

    @routes.post("/api/why")
    async def why(body: ExplanationBody) -> dict[str, Any]:
        started = time.perf_counter()
        with active().in_use() as current:
            explanation = await run_in_threadpool(current.searcher.why, body.request(), body.answer)
        return {**asdict(explanation), "total_ms": _ms_since(started)}

    @routes.post("/api/vector", include_in_schema=has_vectors)
    async def vector(body: RequestBody) -> dict[str, Any]:
        if not has_vectors:
            raise HTTPException(404, "not enabled; start the server with --vectors")
        with active().in_use() as current:
            return asdict(await run_in_threadpool(current.searcher.query_vector, body.request()))

    return routes


def _ranked(documents: Sequence[ScoredDocument]) -> list[dict[str, Any]]:
    return [{"rank": rank, **document._asdict()} for rank, document in enumerate(documents, start=1)]


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Invalid query for this model, or invalid host or headers"},
    404: {"model": ErrorBody, "description": "Unknown user, document or page"},
    408: {"model": ErrorBody, "description": "The request took too long to arrive"},
    411: {"model": ErrorBody, "description": "Chunked request without Content-Length"},
    413: {"model": ErrorBody, "description": "Request too large"},
    422: {"model": ErrorBody, "description": "Invalid request body or parameters"},
    500: {"model": ErrorBody, "description": "A file of the server is damaged; its log has the reason"},
    503: {"model": ErrorBody, "description": "Overloaded, or the vector store does not answer; retry later"},
}


def make_app(
    searcher: Searcher, *, cache_size: int = 10_000, max_batch: int = 32, hosts: Sequence[str] | None = None,
    folders: Folders | None = None, poll_s: float = 1.0, second: Searcher | None = None,
    second_folders: Folders | None = None, has_vectors: bool = False, has_users: bool = False,
    log_folder: Path | None = None, log_days: float = 30.0,
) -> FastAPI:  # fmt: skip
    """Return the application that serves `searcher`, and `second` under SECOND_PREFIX.

    `cache_size=0` disables the cache. `folders` are polled every `poll_s` seconds and reloaded when replaced. Requests
    must have a loopback Host or one of `hosts`, where 0.0.0.0 or :: allows any IP address (not any name); None disables
    the check. `has_vectors` enables /api/vector, `has_users` /api/users. Searches are written to `log_folder`, and
    removed after `log_days`.
    """
    metrics = Metrics()
    served = {"": (searcher, folders), **({} if second is None else {SECOND_PREFIX: (second, second_folders)})}
    live: dict[str, LiveSearcher] = {}
    log = None if log_folder is None else RequestLog(log_folder, log_days, metrics.logged)

    def active(prefix: str) -> ActiveSearcher:
        if prefix not in live:
            raise Overloaded("the server is starting or stopping")
        return live[prefix].active

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for prefix, (opened, watched) in served.items():
            live[prefix] = LiveSearcher(opened, metrics, max_batch, cache_size, watched, poll_s)
        started = list(live.values())
        watching = [asyncio.create_task(one.watch()) for one in started]
        yield
        live.clear()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        for one in started:
            await one.active.end()
        if log is not None:
            await run_in_threadpool(log.close)

    app = FastAPI(title="bigdssm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.add_middleware(RequestLimits, hosts=hosts)
    app.add_middleware(RequestMetrics, metrics=metrics, paths=COUNTED_PATHS)

    faults = FaultLog()

    @app.exception_handler(BigDSSMError)
    async def failed(request: HTTPRequest, error: BigDSSMError) -> JSONResponse:
        """Answer an invalid request with the reason, and a fault of the server without its paths and names."""
        if isinstance(error, ConfigError):
            return error_response(400, error.public_message)
        if isinstance(error, UnknownKeyError):
            return error_response(404, error.public_message)
        faults.put(request.url.path, error)
        if isinstance(error, UnavailableError):
            return error_response(503, "the vector store does not answer; retry later", {"Retry-After": "1"})
        return error_response(500, "the model, index or dataset of the server is damaged; its log has the reason")

    @app.exception_handler(RequestValidationError)
    async def malformed(request: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # the message is about this one
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return error_response(422, f"the request is not valid JSON: {reason}")
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))[:100] or "the request"
        is_shown = not isinstance(first.get("input"), bytes | dict | list | None)
        got = f", got {str(first['input'])[:60]!r}" if is_shown else ""
        return error_response(422, f"{where}: {first['msg']}{got}")

    @app.exception_handler(HTTPException)
    async def no_such_page(request: HTTPRequest, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)

    @app.exception_handler(Overloaded)
    async def overloaded(request: HTTPRequest, error: Overloaded) -> JSONResponse:
        return error_response(503, f"{error}; retry later", {"Retry-After": "1"})

    for prefix in served:
        routes = api(
            partial(active, prefix),
            metrics,
            has_second=second is not None,
            has_vectors=has_vectors,
            has_users=has_users,
            log=log,
        )
        app.include_router(routes, prefix=prefix)
    page, style, script = (PAGE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".html", ".css", ".js"))

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": CONTENT_SECURITY})

    @app.get("/page.css", include_in_schema=False)
    async def page_style() -> Response:
        return Response(style, media_type="text/css")

    @app.get("/page.js", include_in_schema=False)
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def exposition() -> Response:
        def text() -> bytes:
            return metrics.text({f"{prefix}/api": active(prefix).searcher.identity for prefix in served})

        return Response(await run_in_threadpool(text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthy() -> str:
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def ready() -> str:
        if any(active(prefix).batcher.is_full for prefix in served):
            raise Overloaded("the queue is full")
        for one in live.values():
            if one.unavailable is not None:
                raise one.unavailable
        return "ok"

    return app
