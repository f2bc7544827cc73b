"""Compare index types of FAISS with vector stores: building, size, and filtered search over one vectors folder.

    python tools/bench/bench_stores.py --out runs/bench_stores --systems flat ivf hnsw
    python tools/bench/bench_stores.py --out runs/bench_stores --systems postgresql://me@localhost/shop \
        --options build_memory_mb=3000

The vectors are synthetic: 1,000 overlapping clusters, with variances of dimensions, lengths and beta like those of the
quickstart's model; queries are of the same clusters. A filter matches a random share of the documents. Recall@100 is
the share of the exact best 100 that are among the first 100 results. Queries/s are those of single queries, of one
client and of several threads, each search with one thread. Each system is an entry of --out/report.json, to which later
calls add theirs; dataset and vectors are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from rich.console import Console
from rich.table import Table

from bigdssm.cli import at_least, run_main
from bigdssm.config.loading import options_of
from bigdssm.dataset.dataset import Dataset
from bigdssm.features.conditions import parse_filter, resolve
from bigdssm.ingest.api import make_dataset
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.index_types import INDEX_TYPES, set_search_threads
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.queries import Filters
from bigdssm.retrieval.vectors import VECTORS, VectorsMeta, load_vectors, read_meta, write_meta
from bigdssm.stores.base import open_store, store_class
from bigdssm.utils.atomic import write_json
from bigdssm.utils.log import ProgressBar

DIM, CLUSTERS, TOP, MODEL = 64, 1000, 100, "b" * 32
SHARES = {"": 1.0, "part < 100": 0.1, "part < 10": 0.01, "part < 1": 0.001}  # by filter
Search = Callable[[np.ndarray, str], list[str]]  # of a query [D+1] and a filter: keys


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of dataset, vectors, indexes and report.json")
    parser.add_argument("--documents", type=at_least(1), default=1_000_000, help="number (default: %(default)s)")
    parser.add_argument("--queries", type=at_least(1), default=200, help="number (default: %(default)s)")
    parser.add_argument("--clients", type=at_least(1), default=4, help="threads (default: %(default)s)")
    parser.add_argument("--systems", nargs="+", required=True, help="index types, or URLs of stores")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="of all these systems")
    args = parser.parse_args()
    vectors_dir = args.out / "vectors"
    if not vectors_dir.exists():
        prepare(args.out, args.documents)
    dataset, meta = Dataset.open(args.out / "dataset"), read_meta(vectors_dir)
    vectors, queries = load_vectors(vectors_dir, meta), np.load(args.out / "queries.npy")[: args.queries]
    exact = np.concatenate([queries @ chunk.T for chunk in vectors.chunks(65_536)], 1)
    filters = Filters(dataset.catalogue)
    row_of = {key: row for row, key in enumerate(dataset.catalogue.keys(np.arange(meta.num_docs)))}
    report_file = args.out / "report.json"
    rows = json.loads(report_file.read_text())["systems"] if report_file.exists() else {}
    for system in args.systems:
        build = build_faiss if system in INDEX_TYPES.names() else build_store
        started = time.perf_counter()
        size, search = build(system, args.options, args.out, dataset)
        seconds = time.perf_counter() - started
        row = {
            "options": args.options, "build_s": round(seconds, 1), "rows_per_s": round(meta.num_docs / seconds),
            "mb": round(size() / 2**20), "searches": [],
        }  # fmt: skip
        for text in SHARES:
            mask = np.ones(meta.num_docs, bool) if not text else filters.allowed(text).mask
            found = measure(search, text, queries, exact, mask, row_of, args.clients)
            row["searches"].append({"filter": text, **found})
            print(system, text, found, flush=True)
        rows[" ".join([system.partition(":")[0], *args.options])] = row
        about = {
            "documents": meta.num_docs, "width": meta.width, "queries": len(queries), "clients": args.clients,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }  # fmt: skip
        write_json(report_file, {**about, "systems": rows})
    show(json.loads(report_file.read_text()))


def prepare(out: Path, num_docs: int) -> None:
    """Write a dataset with a column that only filters, vectors and queries."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    keys = [f"d{row}" for row in range(num_docs)]
    items = pa.table({"item_id": keys, "part": random.integers(0, 1000, num_docs).astype(float)})
    users = [f"u{number % 100}" for number in range(1000)]
    events = pa.table({"user_id": users, "item_id": keys[:1000], "timestamp": 1.7e9 + np.arange(1000)})
    data = {
        "dir": str(out / "dataset"), "query": {"past": {"type": "history", "of": "item_id", "max_items": 2}},
        "doc": {"item_id": {"type": "categorical"}}, "filter": {"part": {"type": "numeric"}},
    }  # fmt: skip
    (out / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": str(out)}, "data": data, "model": {"dim": DIM}}))
    make_dataset(out / "config.yaml", interactions=events, items=items, rating_column=None, overwrite=True)
    dataset = Dataset.open(out / "dataset")
    keys = dataset.catalogue.keys(np.arange(num_docs))
    scale = np.exp(-np.arange(DIM, dtype=np.float32) / 20) / 4
    centres = scale * random.standard_normal((CLUSTERS, DIM), np.float32)

    def points(number: int) -> np.ndarray:
        near = centres[random.integers(0, CLUSTERS, number)]
        return np.asarray(near + scale * random.standard_normal((number, DIM), np.float32))

    folder = out / "vectors"
    folder.mkdir()
    np.save(folder / "vectors.npy", np.pad(points(num_docs), ((0, 0), (0, 1))))
    vectors = np.load(folder / "vectors.npy", "r+")
    vectors[:, DIM] = random.normal(0, 0.04, num_docs)
    np.save(out / "queries.npy", np.pad(points(1000), ((0, 0), (0, 1)), constant_values=1))
    documents = pa.table({"doc_key": keys, "doc_title": [f"Title of {key}" for key in keys]})
    with pa.OSFile(str(folder / "documents.arrow"), "wb") as file, pa.ipc.new_file(file, documents.schema) as writer:
        writer.write_table(documents)
    write_meta(folder, VectorsMeta(VECTORS, MODEL, dataset.fingerprint, num_docs, DIM + 1, score="dot"))


def build_faiss(kind: str, options: list[str], out: Path, dataset: Dataset) -> tuple[Callable[[], int], Search]:
    """Build an index; return its bytes and a search."""
    folder = out / kind
    build_index(out / "vectors", folder, kind, options=options_of(options, INDEX_TYPES.classes[kind]), overwrite=True)
    index, filters = open_index(folder), Filters(dataset.catalogue)

    def search(query: np.ndarray, text: str) -> list[str]:
        set_search_threads(1)
        allowed = filters.allowed(text) if text else None
        scores, rows = index.nearest(query[None], TOP, MODEL, allowed=allowed)
        return [document.key for document in index.documents(scores[0], rows[0])]

    return lambda: sum(file.stat().st_size for file in folder.iterdir()), search


def build_store(url: str, options: list[str], out: Path, dataset: Dataset) -> tuple[Callable[[], int], Search]:
    """Publish to a store; return its bytes and a search."""
    store: Any = open_store(url, options_of(options, store_class(url)))
    with ProgressBar() as progress:
        collection = publish(store, out / "vectors", dataset, "bench", progress).collection

    def size() -> int:
        table = '"bigdssm_vectors_bench"'
        return int(store._select("SELECT pg_total_relation_size(%s)", [table])[0][0])

    def search(query: np.ndarray, text: str) -> list[str]:
        where = resolve(parse_filter(text), dataset.catalogue.filterable) if text else None
        return [document.key for document in store.search(collection, query[None], TOP, where)[0]]

    return size, search


def measure(
    search: Search, text: str, queries: np.ndarray, exact: np.ndarray, mask: np.ndarray, row_of: dict[str, int],
    clients: int,
) -> dict[str, Any]:  # fmt: skip
    """Return recall@TOP against `exact`, float32 [m, N], and queries/s of one client and of several."""
    top = min(TOP, int(mask.sum()))
    least = -np.partition(-exact[:, mask], top - 1, axis=1)[:, top - 1]
    for query in queries[:5]:
        search(query, text)
    started = time.perf_counter()
    results = [search(query, text) for query in queries]
    rate = len(queries) / (time.perf_counter() - started)
    found = 0
    for scores, bound, keys in zip(exact, least, results, strict=True):
        rows = [row_of[key] for key in keys]
        assert mask[rows].all() and len(set(keys)) == len(keys) == top
        found += int((scores[rows] >= bound - 1e-5).sum())
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda query: search(query, text), queries[:clients]))  # connects
        started = time.perf_counter()
        list(pool.map(lambda query: search(query, text), queries))
        together = len(queries) / (time.perf_counter() - started)
    return {"recall": found / (top * len(queries)), "queries_per_s": round(rate, 1), "of_clients": round(together, 1)}


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    table = Table(title=f"{report['documents']:,} documents, width {report['width']}, {report['machine']}")
    for column in ("system", "rows/s", "MB", "filter", "recall@100", "queries/s", f"{report['clients']} clients"):
        table.add_column(column)
    for system, row in report["systems"].items():
        for found in row["searches"]:
            table.add_row(
                system, f"{row['rows_per_s']:,}", f"{row['mb']:,}", found["filter"] or "none",
                f"{found['recall']:.3f}", f"{found['queries_per_s']:,.0f}", f"{found['of_clients']:,.0f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
