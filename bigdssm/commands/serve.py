"""Serve a model and its index over HTTP: an API and a page to try it.

    bigdssm serve --model MODEL --index INDEX [--data DATASET] [--port 8000]

The page is at http://127.0.0.1:8000; the API is described in bigdssm/serving/app.py. Queries that wait together are
encoded and searched together, and the answers of the last --cache queries are kept. It listens on this machine alone
unless --host says otherwise, and asks nobody who they are. It answers to localhost and to --host; another name that
leads here, such as a proxy's, is to be given with --allow-host. SIGTERM and Ctrl-C stop it after at most --timeout-s
seconds. --data is needed where queries have users, histories or filters and the dataset is not at the path that the
model was trained with.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bigdssm.cli import command
from bigdssm.errors import ConfigError
from bigdssm.serving.searcher import Searcher


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--index", type=Path, required=True, help="index folder")
    parser.add_argument("--data", help="dataset folder or URL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (%(default)s)")
    parser.add_argument("--cache", type=int, default=10_000, metavar="QUERIES", help="answers to keep (%(default)s)")
    parser.add_argument("--at-once", type=int, default=32, metavar="QUERIES", help="most in a batch (%(default)s)")
    parser.add_argument("--threads", type=int, help="of the model and the index (default: OMP_NUM_THREADS, or all)")
    parser.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help="names it is asked by as well")
    parser.add_argument(
        "--timeout-s", type=int, default=10, metavar="SECONDS",
        help="most that a request may take to arrive, and a stop to end (%(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for option, least in (("cache", 0), ("at_once", 1), ("threads", 1), ("timeout_s", 1)):
        if (value := getattr(args, option)) is not None and value < least:
            raise ConfigError(f"--{option.replace('_', '-')} {value}: needs at least {least}")
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port {args.port}: needs 0 to 65535")
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving needs {' and '.join(missing)}: pip install 'bigdssm[serve]'")
    from bigdssm.serving.app import make_app
    from bigdssm.serving.server import run

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    searcher = Searcher.open(args.model, args.index, args.data, args.threads)
    app = make_app(searcher, cache_size=args.cache, at_once=args.at_once, hosts=[args.host, *args.allow_host])
    with _listen(args.host, args.port) as listening:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listening.getsockname()[1]}  (Ctrl-C stops)", flush=True)
        run(app, listening, args.timeout_s)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError: taken, not allowed, or no address of this machine."""
    try:
        family: dict[str, Any] = {"family": socket.AF_INET6} if ":" in host else {}
        return socket.create_server((host, port), **family)
    except OSError as error:
        why = error.strerror or error
        if error.errno is not None and error.errno > 0:  # below 0 are those of unknown names
            why = os.strerror(error.errno)
        at = f"--host {host} --port {port}"
        raise ConfigError(f"{at} cannot be listened on: {why}; choose another (--port 0 takes any free one)") from None
