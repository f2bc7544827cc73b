"""Load test of a running server: throughput and latency of concurrent queries.

    python tools/bench/bench_serve.py --url http://127.0.0.1:8000 --queries FILE [--feature NAME] [--clients 8] \\
        [--seconds 20]

Each line of FILE is a query: a value of the query feature NAME (default: the first), or with --user the key of a user.
Repeated lines are served from the cache: start the server with --cache 0 to measure the model and the index.
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bigdssm.cli import run_main
from bigdssm.errors import ConfigError, DataError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server (default: %(default)s)")
    parser.add_argument("--queries", type=Path, required=True, metavar="FILE", help="text file, one query per line")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--feature", metavar="NAME", help="query feature of the lines (default: the server's first)")
    kind.add_argument("--user", action="store_true", help="the lines are keys of users")
    parser.add_argument("--clients", type=int, default=8, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the test (default: %(default)s)")
    args = parser.parse_args()
    if args.clients < 1 or not args.seconds > 0:
        raise ConfigError("--clients needs at least 1, --seconds more than 0")
    try:
        lines = [line for line in args.queries.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError:
        raise DataError(f"{args.queries} is no UTF-8 text file") from None
    if not lines:
        raise DataError(f"{args.queries} contains no queries")
    address = urlsplit(args.url).netloc
    try:
        socket.create_connection((urlsplit(args.url).hostname or "", urlsplit(args.url).port or 80), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--url {args.url}: no server responds ({error}); start bigdssm serve") from None
    feature = args.feature or next(iter(call(HTTPConnection(address), "GET", "/api/about")["features"]), None)
    if feature is None and not args.user:
        raise ConfigError("this server's queries have no features; use --user")
    bodies = [json.dumps({"user": line} if args.user else {"features": {feature: line}}) for line in lines]
    before = server_metrics(address)
    seconds, elapsed = load(address, bodies, args.clients, args.seconds)
    after = server_metrics(address)
    done = {name: after[name] - before.get(name, 0.0) for name in after}
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    print(
        f"{len(seconds)} queries by {args.clients} clients in {elapsed:.1f} s: {len(seconds) / elapsed:.0f} queries/s"
    )
    print(f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    per_batch = done["bigdssm_batch_queries_sum"] / max(1, done["bigdssm_batch_queries_count"])
    print(f"{done.get('bigdssm_cache_total hit', 0.0):.0f} from the cache, {per_batch:.1f} queries per batch")


def load(address: str, bodies: list[str], clients: int, duration_s: float) -> tuple[np.ndarray, float]:
    """Send requests and return the seconds of every query and in total."""
    requests = itertools.cycle(bodies)
    lock, seconds, errors = threading.Lock(), list[float](), list[Exception]()
    end = time.perf_counter() + duration_s

    def client() -> None:
        connection = HTTPConnection(address)
        try:
            while time.perf_counter() < end and not errors:
                with lock:
                    body = next(requests)
                started = time.perf_counter()
                call(connection, "POST", "/api/search", body)
                seconds.append(time.perf_counter() - started)
        except (DataError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return np.array(seconds), time.perf_counter() - started


def server_metrics(address: str) -> dict[str, float]:
    """Return the Prometheus metrics of the server by name and labels."""
    connection = HTTPConnection(address)
    connection.request("GET", "/metrics")
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(connection.getresponse().read().decode()):
        for sample in family.samples:
            values[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return values


def call(connection: HTTPConnection, method: str, path: str, body: str | None = None) -> Any:
    """Return the response as JSON. Raises DataError: a status other than 200."""
    connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        raise DataError(f"{path}: status {response.status}: {answer.get('error')}")
    return answer


if __name__ == "__main__":
    sys.exit(run_main(main))
