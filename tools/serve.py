"""Serve a model and its index over HTTP: an API and a page to try it.

    python tools/serve.py --model MODEL --index INDEX [--data DATASET] [--port 8000]

The page is at http://127.0.0.1:8000; the API is described in bigdssm/serving/app.py. Queries that wait together are
encoded and searched together, and the answers of the last --cache queries are kept. It listens on this machine alone
unless --host says otherwise, and asks nobody who they are. --data is needed where queries have users or histories and
the dataset is not at the path that the model was trained with.
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
import sys
from pathlib import Path

import torch

from bigdssm.cli import run_main
from bigdssm.data import Dataset
from bigdssm.data.cache import Cache
from bigdssm.errors import ConfigError
from bigdssm.export import ModelFolder, load_model_folder
from bigdssm.retrieval.index import open_index
from bigdssm.serving.searcher import Searcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--index", type=Path, required=True, help="index folder")
    parser.add_argument("--data", help="dataset folder or URL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (%(default)s)")
    parser.add_argument("--cache", type=int, default=10_000, metavar="QUERIES", help="answers to keep (%(default)s)")
    parser.add_argument("--at-once", type=int, default=32, metavar="QUERIES", help="most in a batch (%(default)s)")
    parser.add_argument("--threads", type=int, help="of the model and the index (default: OMP_NUM_THREADS, or all)")
    args = parser.parse_args()
    if args.cache < 0 or args.at_once < 1 or not 0 <= args.port < 65536:
        raise ConfigError("--cache needs at least 0, --at-once at least 1, --port 0 to 65535")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads {args.threads}: needs at least 1")
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving needs {' and '.join(missing)}: pip install 'bigdssm[serve]'")
    import uvicorn

    from bigdssm.serving.app import make_app

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder, index = load_model_folder(args.model), open_index(args.index)
    searcher = Searcher(folder, index, dataset_of(folder, args.data), args.threads)
    app = make_app(searcher, cache_size=args.cache, at_once=args.at_once)
    with socket.create_server((args.host, args.port)) as listening:
        print(f"http://{args.host}:{listening.getsockname()[1]}  (Ctrl-C stops)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])


def dataset_of(folder: ModelFolder, data: str | None) -> Dataset | None:
    """Return the dataset, or None where queries are typed features alone and nobody named one."""
    if data is None and all(feature.type != "history" for feature in folder.schema.query.values()):
        return None
    return Dataset.open(data or folder.config.data.dir, cache=Cache.of(folder.config.data))


if __name__ == "__main__":
    sys.exit(run_main(main))
