"""The HTTP API and the page.

GET  /                    the page
GET  /api/about           model, index, query features
GET  /api/users           some users to choose from
POST /api/search          {"features": {"name": "value"}} or {"user": "key"} or {"history": ["title"]}, and "top"
GET  /api/similar?key=K   the nearest documents of a document
GET  /api/statistics      queries answered, batches, cache hits

What cannot be answered comes back as 4xx with {"error": "one sentence"}; 503 where too many wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from bigdssm.errors import BigDSSMError, DataError
from bigdssm.retrieval.search import Query
from bigdssm.serving.batching import Batcher, Cache, Overloaded
from bigdssm.serving.searcher import Found, Searcher

PAGE = Path(__file__).with_name("page.html")
MOST_DOCUMENTS, MOST_CHARACTERS, MOST_VALUES, MOST_BYTES = 100, 10_000, 1000, 1 << 20
ShortText = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Top = Annotated[int, Field(ge=1, le=MOST_DOCUMENTS)]


class Ask(BaseModel):
    """A query: exactly one of features, user and history."""

    model_config = ConfigDict(extra="forbid")

    features: dict[str, ShortText] | None = Field(None, max_length=MOST_VALUES)
    user: ShortText | None = None
    history: list[ShortText] | None = Field(None, max_length=MOST_VALUES)
    top: Top = 10


def make_app(searcher: Searcher, *, cache_size: int = 10_000, at_once: int = 32) -> FastAPI:
    """Return the application that answers with `searcher`; cache_size 0 keeps no answers."""
    batcher: Batcher[tuple[Query, int], Found] = Batcher(searcher.search, at_once)
    cache: Cache[dict[str, Any]] = Cache(cache_size)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    app = FastAPI(title="bigdssm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_LimitBody)
    page = PAGE.read_text(encoding="utf-8")

    @app.exception_handler(BigDSSMError)
    async def refused(request: Request, error: BigDSSMError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 404 if isinstance(error, DataError) else 400)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": _sentence(error)}, 422)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        return JSONResponse({"error": f"{error}; ask again later"}, 503, {"Retry-After": "1"})

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        return searcher.about()

    @app.get("/api/users")
    async def users() -> list[str]:
        return searcher.users

    @app.post("/api/search")
    async def search(ask: Ask) -> dict[str, Any]:
        started = time.perf_counter()
        key = ask.model_dump_json()
        answer = cache.get(key)
        cached = answer is not None
        if answer is None:
            # In a thread: looking up users and unknown titles may take long, and others are to be answered meanwhile.
            query = await run_in_threadpool(searcher.query, ask.features, ask.user, ask.history)
            found = await batcher((query, ask.top))
            timing = {"encode_ms": found.encode_ms, "search_ms": found.search_ms, "batch": found.batch}
            answer = {"documents": found.documents, "history": searcher.seen(query), **timing}
            cache.put(key, answer)
        return {**answer, "cached": cached, "total_ms": (time.perf_counter() - started) * 1000}

    @app.get("/api/similar")
    async def similar(key: ShortText, top: Top = 10) -> dict[str, Any]:
        started = time.perf_counter()
        name, documents = await run_in_threadpool(searcher.similar, key, top)
        return {"of": name, "documents": documents, "total_ms": (time.perf_counter() - started) * 1000}

    @app.get("/api/statistics")
    async def statistics() -> dict[str, int]:
        return {
            "answered": batcher.answered, "batches": batcher.batches,
            "cache_hits": cache.hits, "cache_misses": cache.misses,
        }  # fmt: skip

    return app


class _LimitBody:
    """Answers requests whose body is larger than MOST_BYTES, or does not say how large it is, without reading them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                answer = JSONResponse({"error": "the request has no Content-Length; send the query in one piece"}, 411)
                return await answer(scope, receive, send)
            if int(length) > MOST_BYTES:
                said = f"the query has {int(length)} bytes, at most {MOST_BYTES} are read"
                return await JSONResponse({"error": said}, 413)(scope, receive, send)
        await self._app(scope, receive, send)


def _sentence(error: RequestValidationError) -> str:
    """Return the first thing wrong with a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the request is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or "the request"
    got = "" if isinstance(first.get("input"), bytes | dict | list | None) else f", got {str(first['input'])[:60]!r}"
    return f"{where}: {first['msg']}{got}"
