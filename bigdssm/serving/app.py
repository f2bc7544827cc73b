"""The HTTP API and the page.

GET  /                    the page, with /page.css and /page.js
GET  /api/about           model, index, query features, what filters may be made of
GET  /api/users           some users to choose from
POST /api/search          a request, see Ask and docs/serving.md
GET  /api/similar?key=K   the nearest documents of a document
POST /api/why             what a document is near to in a request
GET  /metrics             what is counted, for Prometheus
GET  /healthz, /readyz    whether the process lives, and whether it takes queries

GET  /openapi.json        all of it, for programs

Where a second model is served beside the first, it answers to the same under /beside/api.

What cannot be answered comes back as 4xx with {"error": "one sentence"}; 503 where too many wait. A page of another
site can have its own name lead to this machine and ask as if it were ours (DNS rebinding): so a request's Host has to
be one of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from bigdssm.errors import BigDSSMError, DataError
from bigdssm.serving.api import PATHS, api
from bigdssm.serving.asks import Refusal
from bigdssm.serving.batching import Overloaded
from bigdssm.serving.gate import Gate, refuse, sentence_of
from bigdssm.serving.live import Answering, Live
from bigdssm.serving.metrics import Counted, Metrics
from bigdssm.serving.searcher import Folders, Searcher

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
    lives: dict[str, Live] = {}

    def answering(prefix: str) -> Callable[[], Answering]:
        def now() -> Answering:
            if prefix not in lives:
                raise Overloaded("the server is starting or stopping")
            return lives[prefix].now

        return now

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for prefix, (opened, lie_in) in served.items():
            lives[prefix] = Live(opened, metrics, at_once, cache_size, lie_in, look_s)
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
    app.add_middleware(Gate, hosts=hosts)
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
