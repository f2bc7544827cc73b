"""HTTP API and search page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from bigdssm.errors import BigDSSMError, DataError
from bigdssm.retrieval.index import ScoredDocument
from bigdssm.retrieval.request import Event, Request
from bigdssm.serving.batching import Overloaded
from bigdssm.serving.limits import RequestLimits, refuse, sentence_of
from bigdssm.serving.live import ActiveSearcher, LiveSearcher
from bigdssm.serving.metrics import Counted, Metrics
from bigdssm.serving.searcher import Folders, Searcher

MOST_DOCUMENTS, MOST_CHARACTERS, MOST_VALUES = 100, 10_000, 1000
ShortText = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]  # no text that reads like one
VALUE = (
    f"needs a text of at most {MOST_CHARACTERS} characters, a finite number, a list of at most {MOST_VALUES} of these, "
    "or null"
)


def _value(value: Any, check: Any) -> Any:
    """Return a feature's value; one sentence in place of one for each type that it could have had."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("feature_value", VALUE) from None


def _integer(value: Any) -> Any:
    """Return an integral number as an int: to JSON Schema 10.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Value = Annotated[
    ShortText | Number | Annotated[list[ShortText | Number], Field(max_length=MOST_VALUES)] | None,
    WrapValidator(_value),
]  # of a feature, as its type reads it
Top = Annotated[int, Field(ge=1, le=MOST_DOCUMENTS)]


class EventBody(BaseModel):
    """Something that the asking user did, of the kind that the model was trained on."""

    model_config = ConfigDict(extra="forbid")

    item: ShortText = Field(description="a document, by its key or its title; an unknown one is skipped")
    time: Number | None = Field(None, description="in the unit of now; without, events are given oldest first")
    action: ShortText | None = Field(None, description="what was done; no model reads it yet")


class RequestBody(BaseModel):
    """A request: what is known of who asks, and which documents may answer."""

    model_config = ConfigDict(extra="forbid")

    user: ShortText | None = Field(None, description="a user of the dataset, whose features and events come first")
    document: ShortText | None = Field(None, description="the key of the document that the query is")
    features: dict[ShortText, Value] | None = Field(None, max_length=MOST_VALUES, description="values of features")
    events: list[EventBody] | None = Field(None, max_length=MOST_VALUES, description="what the user did since")
    now: Number | None = Field(None, description="events after it are not known yet")
    filter: ShortText | None = Field(None, description="which documents may be found, as in year >= 1990")
    exclude_seen: StrictBool | None = Field(None, description="whether documents of events stay out; none: as trained")
    top: Annotated[int, Field(ge=1, le=MOST_DOCUMENTS, strict=True), BeforeValidator(_integer)] = 10

    def request(self) -> Request:
        """Return it as the library takes it."""
        events = None if self.events is None else [Event(**event.model_dump()) for event in self.events]
        return Request(**{**{name: getattr(self, name) for name in RequestBody.model_fields}, "events": events})


class ExplanationBody(RequestBody):
    """A request, and a document that may have answered it."""

    answer: ShortText = Field(description="its key")


class Refusal(BaseModel):
    """Why a request is not answered."""

    error: str


PATHS = ("/api/about", "/api/users", "/api/search", "/api/similar", "/api/why")


def api(answering: Callable[[], ActiveSearcher], metrics: Metrics, *, beside: bool) -> APIRouter:
    """Return the routes of one model, which `answering` names anew for each request.

    `beside` tells clients that there are two. Raises Overloaded and BigDSSMError, which the application answers with.
    """
    routes = APIRouter()

    @routes.get("/api/about")
    async def about() -> dict[str, Any]:
        return {**await run_in_threadpool(answering().searcher.about), "beside": beside}

    @routes.get("/api/users")
    async def users() -> list[str]:
        return answering().searcher.users

    @routes.post("/api/search")
    async def search(ask: RequestBody) -> dict[str, Any]:
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
        return {**answer, "cached": cached, "total_ms": _ms_since(started)}

    @routes.get("/api/similar")
    async def similar(key: ShortText, top: Top = 10) -> dict[str, Any]:
        started = time.perf_counter()
        name, documents = await run_in_threadpool(answering().searcher.similar, key, top)
        return {"of": name, "documents": _ranked(documents), "total_ms": _ms_since(started)}

    @routes.post("/api/why")
    async def why(ask: ExplanationBody) -> dict[str, Any]:
        started = time.perf_counter()
        with answering().asked() as now:
            near = await run_in_threadpool(now.searcher.why, ask.request(), ask.answer)
        return {**asdict(near), "total_ms": _ms_since(started)}

    return routes


def _ranked(documents: Sequence[ScoredDocument]) -> list[dict[str, Any]]:
    return [{"rank": rank, **document._asdict()} for rank, document in enumerate(documents, start=1)]


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


BESIDE = "/beside"
PAGE = Path(__file__).with_name("page.html")
OWN_PATHS = ("/", "/page.css", "/page.js", "/metrics", "/healthz", "/readyz", "/openapi.json")
COUNTED = frozenset([*OWN_PATHS, *PATHS, *(BESIDE + path for path in PATHS)])
# The page has no code or style of its own in it, and asks nobody but us.
CONTENT_SECURITY = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
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
    folders: Folders | None = None, look_s: float = 1.0, beside: Searcher | None = None,
    beside_folders: Folders | None = None,
) -> FastAPI:  # fmt: skip
    """Return the application that answers with `searcher`, and under /beside with `beside`; cache_size 0 keeps nothing.

    With folders it takes up what is put in their place, which it looks for every `look_s` seconds. Requests are to be
    addressed to a loopback name or to one of `hosts`, of which 0.0.0.0 or :: stands for any address (not any name);
    None does not look at whom they are addressed to.
    """
    metrics = Metrics()
    served = {"": (searcher, folders), **({} if beside is None else {BESIDE: (beside, beside_folders)})}
    lives: dict[str, LiveSearcher] = {}

    def answering(prefix: str) -> Callable[[], ActiveSearcher]:
        def now() -> ActiveSearcher:
            if prefix not in lives:
                raise Overloaded("the server is starting or stopping")
            return lives[prefix].now

        return now

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for prefix, (opened, lie_in) in served.items():
            lives[prefix] = LiveSearcher(opened, metrics, at_once, cache_size, lie_in, look_s)
        started = list(lives.values())
        watching = [asyncio.create_task(live.watch()) for live in started]
        yield
        lives.clear()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        for live in started:
            await live.end()

    app = FastAPI(title="bigdssm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.add_middleware(RequestLimits, hosts=hosts)
    app.add_middleware(Counted, metrics=metrics, paths=COUNTED)
    _refuse_in_a_sentence(app)
    for prefix in served:
        app.include_router(api(answering(prefix), metrics, beside=beside is not None), prefix=prefix)
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
        return Response(await run_in_threadpool(metrics.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def lives_on() -> str:
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def takes_queries() -> str:
        if any(answering(prefix)().batcher.is_full for prefix in served):
            raise Overloaded("as many queries wait as may")
        return "ok"

    return app


def _refuse_in_a_sentence(app: FastAPI) -> None:
    @app.exception_handler(BigDSSMError)
    async def refused(request: HTTPRequest, error: BigDSSMError) -> JSONResponse:
        return refuse(404 if isinstance(error, DataError) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        return refuse(422, sentence_of(error))

    @app.exception_handler(HTTPException)
    async def no_such_page(request: HTTPRequest, error: HTTPException) -> JSONResponse:
        return refuse(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)

    @app.exception_handler(Overloaded)
    async def overloaded(request: HTTPRequest, error: Overloaded) -> JSONResponse:
        return refuse(503, f"{error}; ask again later", {"Retry-After": "1"})
