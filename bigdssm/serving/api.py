"""The routes that ask a model; see app.py for what they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from bigdssm.retrieval.index import Document
from bigdssm.serving.asks import Ask, AskWhy, ShortText, Top
from bigdssm.serving.live import Answering
from bigdssm.serving.metrics import Metrics

PATHS = ("/api/about", "/api/users", "/api/search", "/api/similar", "/api/why")


def api(answering: Callable[[], Answering], metrics: Metrics, *, beside: bool) -> APIRouter:
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
        return {**answer, "cached": cached, "total_ms": _ms_since(started)}

    @routes.get("/api/similar")
    async def similar(key: ShortText, top: Top = 10) -> dict[str, Any]:
        started = time.perf_counter()
        name, documents = await run_in_threadpool(answering().searcher.similar, key, top)
        return {"of": name, "documents": _ranked(documents), "total_ms": _ms_since(started)}

    @routes.post("/api/why")
    async def why(ask: AskWhy) -> dict[str, Any]:
        started = time.perf_counter()
        with answering().asked() as now:
            near = await run_in_threadpool(now.searcher.why, ask.request(), ask.answer)
        return {**asdict(near), "total_ms": _ms_since(started)}

    return routes


def _ranked(documents: Sequence[Document]) -> list[dict[str, Any]]:
    return [{"rank": rank, **document._asdict()} for rank, document in enumerate(documents, start=1)]


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
