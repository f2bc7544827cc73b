"""Measure all index types over one folder of vectors: recall, latency and size.

    python tools/bench/bench_index.py --model MODEL --vectors VECTORS --data DATASET [--split test] [--queries 1000]
    python tools/bench/bench_index.py … --types flat sq8 binary --widths 64 --rescore 4 20
    python tools/bench/bench_index.py … --types flat sq8 binary --rescore 4 20 --dtypes float32 int8 binary

Per index type: Recall@100 against exact search, NDCG@10 of the target document (without seen documents), p50 and p99 of
the latency of single queries on one thread, bytes per vector of the saved index, and the build time with
OMP_NUM_THREADS threads. --widths adds truncated vectors; --rescore adds re-ranking of so many candidates per document
with full vectors on disk, whose bytes are listed separately; --dtypes adds vectors in the storage types of embed.
Queries are evenly spaced rows of the split. The score is that of the model (`model.score`: dot or cosine).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import faiss
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import at_least, run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.evaluation.metrics import mean_metrics
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.index import Index, index_meta
from bigdssm.retrieval.index_types import INDEX_TYPES
from bigdssm.retrieval.vectors import (
    CodedVectors,
    Dtype,
    VectorsMeta,
    encode_rows,
    read_meta,
    read_vectors,
    truncate_like,
)
from bigdssm.utils.atomic import write_json
from bigdssm.utils.log import ProgressBar

TOP = 100
ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Queries:
    """Vectors, seen documents and targets of rows of a split."""

    vectors: np.ndarray  # float32 [m, D+1]
    seen: list[np.ndarray]
    target: np.ndarray  # int64 [m]


@dataclass(frozen=True)
class Measurement:
    """Results of one index."""

    kind: str  # index type, width, rescoring and dtype
    recall_at_100: float
    ndcg_at_10: float
    p50_ms: float
    p99_ms: float
    bytes_per_vector: float
    bytes_on_disk: int  # per vector for rescoring, 0 without it
    build_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--vectors", type=Path, required=True, help="folder written by bigdssm embed")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--split", default="test", help="split of the queries (default: %(default)s)")
    parser.add_argument("--queries", type=at_least(1), default=1000, help="number of queries (default: %(default)s)")
    parser.add_argument(
        "--types",
        nargs="+",
        choices=INDEX_TYPES.names(),
        default=INDEX_TYPES.names(),
        help="index types (default: all)",
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[], help="additional widths (default: none)")
    parser.add_argument(
        "--rescore",
        nargs="+",
        type=int,
        default=[],
        help="also re-rank so many candidates per document (default: none)",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=get_args(Dtype), default=["float32"], help="vector types (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="file for the results (default: printed only)")
    args = parser.parse_args()
    if args.queries < 1:
        raise ConfigError(f"--queries {args.queries}: needs at least 1")
    folder, dataset, meta = load_model_folder(args.model), Dataset.open(args.data), read_meta(args.vectors)
    dataset = folder.view(dataset)
    if meta.dtype != "float32":
        raise ConfigError(f"--vectors {args.vectors} are {meta.dtype}, needs those that embed writes without --dtype")
    vectors = read_vectors(args.vectors, folder.doc_checksum, dataset)
    queries = queries_of(tower_encoders(folder.model, dataset), dataset, args.split, args.queries)
    build_threads = faiss.omp_get_max_threads()
    results, exact = [], None
    with ProgressBar() as progress:
        kinds = list(dict.fromkeys(["flat", *args.types]))  # flat is the reference
        plans = [
            replace(index_meta(meta, INDEX_TYPES.make(kind), width, rescore), dtype=dtype)
            for dtype in dict.fromkeys(["float32", *args.dtypes])
            for kind in kinds
            for width in (None, *args.widths)
            for rescore in (0, *args.rescore)
            if rescore or not INDEX_TYPES.make(kind).needs_rescore
        ]
        for number, plan in enumerate(plans):
            progress("index types", number, len(plans))
            retrieved, result = measure(plan, vectors, queries, exact, build_threads)
            exact = retrieved if exact is None else exact
            results.append(result)
    title = (
        f"{len(queries.vectors)} queries of {args.split}, {meta.num_docs} documents, width {meta.width}, score "
        f"{folder.config.model.score}; built with {build_threads} threads, searched with one"
    )
    show(title, results)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"about": title, "indexes": [asdict(result) for result in results]})


def queries_of(encoders: Encoders, dataset: Dataset, split: str, number: int) -> Queries:
    """Encode at most `number` evenly spaced rows of a split."""
    selected = np.linspace(0, dataset.num_rows(split) - 1, min(number, dataset.num_rows(split))).astype(np.int64)
    vectors, seen, target = [], [], []
    for rows in dataset.iterate(split, ROWS_PER_BATCH):
        inside = np.flatnonzero(np.isin(rows.row_ids, selected) & (rows.relevance > 0))
        if len(inside):
            vectors.append(encoders.queries(rows).numpy()[inside])
            seen += [seen_of(rows, i) for i in inside.tolist()]
            target.append(rows.doc_rows[inside])
    return Queries(np.concatenate(vectors), seen, np.concatenate(target).astype(np.int64))


def seen_of(rows: Rows, i: int) -> np.ndarray:
    return np.setdiff1d(rows.seen(i), rows.doc_rows[i])  # a repeated target stays a candidate


def measure(
    plan: VectorsMeta, vectors: np.ndarray, queries: Queries, exact: np.ndarray | None, threads: int
) -> tuple[np.ndarray, Measurement]:
    """Build an index; return its results, int64 [m, TOP], and its measurement against the `exact` results."""
    faiss.omp_set_num_threads(threads)
    started = time.perf_counter()
    whole = CodedVectors(encode_rows(vectors, plan.dtype, plan.has_beta), plan.dtype, vectors.shape[1], plan.has_beta)
    searched = (
        whole if not plan.whole else CodedVectors(truncate_like(whole[:], plan), "float32", plan.width, plan.has_beta)
    )
    faiss_index = INDEX_TYPES.make(plan.kind, plan.options).build(searched)
    build_s = time.perf_counter() - started
    faiss.omp_set_num_threads(1)
    names = pa.chunked_array([pa.nulls(0, pa.string())])
    index = Index(faiss_index, plan, names, names, whole if plan.rescored else None)
    retrieved, seconds = [], []
    for vector, seen in zip(queries.vectors[:, None], queries.seen, strict=True):
        started = time.perf_counter()
        retrieved.append(index.nearest(vector, TOP, plan.model_checksum, [seen])[1][0])
        seconds.append(time.perf_counter() - started)
    rows = np.stack(retrieved)
    reference = rows if exact is None else exact
    same = [np.intersect1d(a[a >= 0], b[b >= 0]).size for a, b in zip(rows, reference, strict=True)]
    recall = float(np.mean(same / np.maximum(1, (reference >= 0).sum(axis=1))))
    is_target = rows == queries.target[:, None]
    ranks = np.where(is_target.any(axis=1), is_target.argmax(axis=1) + 1.0, np.inf)
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    size = faiss.serialize_index(faiss_index).nbytes / plan.num_docs
    one = np.zeros((1, whole.width), np.float32)
    on_disk = encode_rows(one, plan.dtype, plan.has_beta).nbytes if plan.rescored else 0
    ndcg = mean_metrics(ranks)["ndcg_at_10"]
    name = f"{plan.kind}{f' {plan.width - plan.has_beta}' if plan.whole else ''}"
    name += f" × {plan.rescored}" if plan.rescored else ""
    name += "" if plan.dtype == "float32" else f" of {plan.dtype}"
    return rows, Measurement(name, recall, ndcg, float(p50), float(p99), size, on_disk, build_s)


def show(title: str, results: list[Measurement]) -> None:
    table = Table(title=title)
    for column in ("index", "Recall@100", "NDCG@10", "p50 ms", "p99 ms", "bytes/vector", "on disk", "build s"):
        table.add_column(column, justify="left" if column == "index" else "right")
    for m in results:
        table.add_row(
            m.kind, f"{m.recall_at_100:.3f}", f"{m.ndcg_at_10:.4f}", f"{m.p50_ms:.2f}", f"{m.p99_ms:.2f}",
            f"{m.bytes_per_vector:.0f}", str(m.bytes_on_disk), f"{m.build_s:.1f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
