"""Serve a model and its index over HTTP: a JSON API and a demo page.

    bigdssm serve --model MODEL --index INDEX [--data DATASET] [--port 8000]
    bigdssm serve --model MODEL --index INDEX --second OTHER_MODEL OTHER_INDEX
    bigdssm serve --model MODELS --index postgresql://HOST/DATABASE

The page is at http://127.0.0.1:8000; docs/serving.md documents the API. Waiting queries are encoded and searched in one
batch; the responses to the last --cache queries are cached. --workers N runs N processes, which share the memory of the
index. --second serves a second model for comparison, under /second/api and on the page. If the model and index folders
are replaced, the server loads the new ones within --poll-s seconds without dropping a request. With a vector store it
follows the alias `live` (URL#NAME: another alias or a collection) and opens the model of the collection among those in
the folder MODELS; --vectors adds POST /api/vector, the vector of a query, and --list-users GET /api/users, the ids of
the first users, which the page suggests. By default it accepts connections from this
machine only (--host), without authentication. The Host header must be localhost, the value of --host, or a name in
--allow-host, for example that of a proxy. SIGTERM and Ctrl-C stop it within --timeout-s seconds. --data is required if
queries have users, histories or filters and the dataset has been moved since training.
"""

import argparse
import importlib.util
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigdssm.cli import RERANKING, SEARCH_OPTIONS, at_least, command, option
from bigdssm.commands._ranks import QUERY_DEVICE
from bigdssm.errors import ConfigError
from bigdssm.serving.searcher import Folders, Searcher
from bigdssm.utils.log import setup_logging


@command(
    *SEARCH_OPTIONS,
    option("--second", nargs=2, metavar=("MODEL", "INDEX"), help="second model and index for comparison"),
    option("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"),
    option("--port", type=int, default=8000, help="port to listen on, 0 for any (default: %(default)s)"),
    option("--cache", type=int, default=10_000, metavar="QUERIES", help="responses to cache (default: %(default)s)"),
    option("--max-batch", type=int, default=32, metavar="QUERIES", help="maximum batch size (default: %(default)s)"),
    option("--threads", type=int, help="threads per worker (default: OMP_NUM_THREADS, or all cores)"),
    option(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="ONNX query tower, such as EXPORT/query.int8.onnx (default: the tower of --model)",
    ),
    RERANKING,
    option("--workers", type=int, default=1, help="number of processes (default: %(default)s)"),
    option(
        "--poll-s",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="interval of checks for a replaced model or index (default: %(default)s)",
    ),
    option("--vectors", action="store_true", help="enable POST /api/vector, the vector of a query"),
    option("--list-users", action="store_true", help="enable GET /api/users, user ids that the page suggests"),
    QUERY_DEVICE,
    option("--log-requests", type=Path, metavar="FOLDER", help="write searches and their answers to Parquet files"),
    option(
        "--log-days",
        type=at_least(1),
        default=30,
        metavar="DAYS",
        help="age at which files of --log-requests are removed (default: %(default)s)",
    ),
    option("--access-log", action="store_true", help="write one JSON line per request to stderr"),
    option("--allow-host", nargs="+", default=[], metavar="NAME", help="further accepted host names (default: none)"),
    option(
        "--timeout-s",
        type=int,
        default=10,
        metavar="SECONDS",
        help="time limit for receiving a request, and for stopping (default: %(default)s)",
    ),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    for name, least in (("cache", 0), ("max_batch", 1), ("threads", 1), ("timeout_s", 1), ("workers", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: needs at least {least}")
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port {args.port}: needs 0 to 65535")
    if not 0.1 <= args.poll_s < 1e6:
        raise ConfigError(f"--poll-s {args.poll_s}: needs 0.1 to 1,000,000")
    needed = ("fastapi", "prometheus_client", "uvicorn")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving needs {' and '.join(missing)}: pip install 'bigdssm[serve]'")
    from bigdssm.serving.server import METRICS_DIR, run_workers  # imports the packages above

    opened = _open(args)
    with _listen(args.host, args.port) as listening:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listening.getsockname()[1]}  (Ctrl-C stops)", flush=True)
        if args.workers == 1:
            _serve(args, listening, lambda: None, opened)
            return
        del opened  # only to report errors early; every worker opens its own
        with tempfile.TemporaryDirectory(prefix="bigdssm-metrics-") as counted:
            os.environ[METRICS_DIR] = counted
            run_workers(args.workers, _serve, (args, listening), args.timeout_s)


Opened = tuple[Searcher, Folders, Searcher | None, Folders | None]
"""The searcher and its folders, and those of --second."""


def _open(args: argparse.Namespace) -> Opened:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folders = Folders(
        args.model, args.index, args.data, args.threads, args.onnx, args.rerank, args.reranker, args.device
    )  # fmt: skip
    second = None
    if args.second is not None:
        model, index = args.second
        second = Folders(Path(model), index, args.data, args.threads, device=args.device)
    return folders.open(), folders, None if second is None else second.open(), second


def _serve(
    args: argparse.Namespace, listening: socket.socket, ready: Callable[[], None], opened: Opened | None = None
) -> None:
    """Serve in this process until a stop signal; `ready` is called when the searchers are open."""
    from bigdssm.serving.app import make_app
    from bigdssm.serving.metrics import log_accesses
    from bigdssm.serving.server import run

    setup_logging()
    if args.access_log:
        log_accesses()
    searcher, folders, second, second_folders = opened or _open(args)
    app = make_app(
        searcher, cache_size=args.cache, max_batch=args.max_batch, hosts=(args.host, *args.allow_host), folders=folders,
        poll_s=args.poll_s, second=second, second_folders=second_folders, has_vectors=args.vectors,
        has_users=args.list_users, log_folder=args.log_requests, log_days=args.log_days,
    )  # fmt: skip
    ready()
    run(app, listening, args.timeout_s)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError: port in use, no permission, or no address of this machine."""
    try:
        family: dict[str, Any] = {"family": socket.AF_INET6} if ":" in host else {}
        return socket.create_server((host, port), **family)
    except OSError as error:
        why = error.strerror or error
        if error.errno is not None and error.errno > 0:  # errors of name resolution are negative
            why = os.strerror(error.errno)
        address = f"--host {host} --port {port}"
        fix = "choose another port or address (--port 0 selects a free port)"
        raise ConfigError(f"{address}: cannot listen: {why}; {fix}") from None


if __name__ == "__main__":
    raise SystemExit(main())
