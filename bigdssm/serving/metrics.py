"""Prometheus metrics over all worker processes, and a JSON access log."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigdssm.serving.searcher import SearchResult
from bigdssm.serving.server import METRICS_DIR
from bigdssm.utils.log import get_logger

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
QUERIES = (1, 2, 4, 8, 16, 32, 64)
OTHER = "other"  # label of unknown paths, to bound the number of labels
logger = get_logger("bigdssm.serving.requests")
logger.setLevel(logging.WARNING)


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "bigdssm_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.request_s = Histogram(
            "bigdssm_request_seconds", "Time to answer, by path", ["path"], buckets=SECONDS, registry=registry
        )
        self._encode_s = Histogram("bigdssm_encode_seconds", "Of a batch", buckets=SECONDS, registry=registry)
        self._search_s = Histogram("bigdssm_search_seconds", "Of a batch", buckets=SECONDS, registry=registry)
        self._batch = Histogram(
            "bigdssm_batch_queries", "Queries answered together", buckets=QUERIES, registry=registry
        )
        self.cache = Counter("bigdssm_cache", "Cache lookups", ["result"], registry=registry)
        self.unknown_users = Counter("bigdssm_unknown_users", "Requests of an unknown user", registry=registry)
        self.unknown_events = Counter("bigdssm_unknown_events", "Events with an unknown item", registry=registry)
        self.unknown_excluded = Counter(
            "bigdssm_unknown_excluded", "Unknown keys of documents to exclude", registry=registry
        )
        self.logged = Counter("bigdssm_logged_requests", "Of --log-requests", ["result"], registry=registry)
        self.reloads = Counter("bigdssm_model_loads", "Models and indexes reloaded while serving", registry=registry)

    def batch(self, result: SearchResult) -> None:
        """Count one batch; `result` is of any of its queries."""
        self._encode_s.observe(result.encode_ms / 1000)
        self._search_s.observe(result.search_ms / 1000)
        self._batch.observe(result.batch)

    def text(self, served: Mapping[str, Mapping[str, Any]]) -> bytes:
        """Return the metrics of all workers, and the indexes of this one, in Prometheus' text format.

        `served` are `Searcher.identity` by path of the API.
        """
        registry = self._registry
        if METRICS_DIR in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        own = CollectorRegistry()  # computed when read: values of workers that have reloaded or ended would remain
        own.register(_Served(served))
        return generate_latest(registry) + generate_latest(own)


@dataclass(eq=False)  # hashable, for the registry
class _Served(Collector):
    """Gauges of the served models and indexes."""

    served: Mapping[str, Mapping[str, Any]]

    def collect(self) -> Iterator[Metric]:
        """Return one sample per model and gauge."""
        labels = ("model", "index", "store", "collection", "dataset", "version")
        info = InfoMetricFamily("bigdssm_index", "Live model and index", labels=["path"])
        documents = GaugeMetricFamily("bigdssm_index_documents", "Documents when it was loaded", labels=["path"])
        published = GaugeMetricFamily("bigdssm_index_published_seconds", "Since 1970", labels=["path"])
        age = GaugeMetricFamily("bigdssm_index_age_seconds", "Since it was published", labels=["path"])
        for path, about in self.served.items():
            info.add_metric([path], {name: str(about[name]) for name in labels if about[name] is not None})
            documents.add_metric([path], about["documents"])
            if about["published"] is not None:
                published.add_metric([path], about["published"])
                age.add_metric([path], about["age_s"])
        yield from (info, documents, published, age)


class RequestMetrics:
    """Middleware that counts requests, and logs them if `log_accesses` was called."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and record its status and duration."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self._paths else OTHER
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_s.labels(path).observe(seconds)
            if logger.isEnabledFor(logging.INFO):
                record = {
                    "time": round(time.time(), 3), "method": scope["method"], "path": scope["path"][:200],
                    "status": status, "ms": round(seconds * 1000, 2), "client": (scope.get("client") or [""])[0],
                }  # fmt: skip
                logger.info(json.dumps(record))


def log_accesses() -> None:
    """Write one line of JSON per request to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
