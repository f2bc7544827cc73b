"""Measure every kind of index over one folder of vectors: what it finds, how fast, how large.

    python tools/bench/bench_index.py --model MODEL --vectors VECTORS --data DATASET [--split test] [--queries 1000]
    python tools/bench/bench_index.py … --types flat sq8 binary --widths 64 --rescore 4 20
    python tools/bench/bench_index.py … --types flat sq8 binary --rescore 4 20 --dtypes float32 int8 binary

For each kind: Recall@100 against the exact search, NDCG@10 of each row's document (seen documents left out), p50 and
p99 of one query's time on one thread, bytes per vector of the saved index, and the time to build it with the threads
that OMP_NUM_THREADS gives. With --widths also over vectors cut to these; with --rescore also where whole vectors choose
among so many candidates a document, which stay on the disk: their bytes have a column of their own. With --dtypes also
over vectors as embed codes them, which then are those that choose. Queries are rows of the split, evenly spread. The
score is the one that the model was trained with (`model.score`: dot or cosine); another needs vectors of another model.
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
from bigdssm.cli import ProgressBar, at_least, run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.evaluation.metrics import mean_metrics
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.index import Index, planned
from bigdssm.retrieval.index_types import INDEX_TYPES, index_type
from bigdssm.retrieval.vectors import (
    CodedVectors,
    Dtype,
    VectorsMeta,
    bytes_per_vector,
    coded,
    cut_like,
    read_meta,
    vectors_of,
)
from bigdssm.utils.atomic import write_json

TOP = 100
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Queries:
    """Rows of a split: their vectors, what each has seen, and the document that is right."""

    vectors: np.ndarray  # float32 [m, D+1]
    seen: list[np.ndarray]
    right: np.ndarray  # int64 [m]


@dataclass(frozen=True)
class Measured:
    kind: str  # and what was done to its vectors
    recall_at_100: float
    ndcg_at_10: float
    p50_ms: float
    p99_ms: float
    bytes_per_vector: float
    bytes_on_disk: int  # of the vector that scores candidates again, 0 where none does
    build_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--vectors", type=Path, required=True, help="folder written by tools/embed.py")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--split", default="test", help="where queries come from (%(default)s)")
    parser.add_argument("--queries", type=at_least(1), default=1000, help="number of queries (%(default)s)")
    parser.add_argument("--types", nargs="+", choices=INDEX_TYPES.names(), default=INDEX_TYPES.names(), help="kinds")
    parser.add_argument("--widths", nargs="+", type=int, default=[], help="also over vectors cut to these")
    parser.add_argument("--rescore", nargs="+", type=int, default=[], help="also with so many candidates scored again")
    parser.add_argument("--dtypes", nargs="+", choices=get_args(Dtype), default=["float32"], help="of the vectors")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where to save the figures")
    args = parser.parse_args()
    if args.queries < 1:
        raise ConfigError(f"--queries {args.queries}: needs at least 1")
    folder, dataset, meta = load_model_folder(args.model), Dataset.open(args.data), read_meta(args.vectors)
    dataset = folder.view(dataset)
    if meta.dtype != "float32":
        raise ConfigError(f"--vectors {args.vectors} are {meta.dtype}, needs those that embed writes without --dtype")
    vectors = vectors_of(args.vectors, folder.checksum, dataset)
    queries = queries_of(tower_encoders(folder.model, dataset), dataset, args.split, args.queries)
    build_threads = faiss.omp_get_max_threads()
    measured, exact = [], None
    with ProgressBar() as progress:
        kinds = list(dict.fromkeys(["flat", *args.types]))  # flat is what the others are measured against
        plans = [
            replace(planned(meta, index_type(kind), width, rescore), dtype=dtype)
            for dtype in dict.fromkeys(["float32", *args.dtypes])
            for kind in kinds
            for width in (None, *args.widths)
            for rescore in (0, *args.rescore)
            if rescore or not index_type(kind).needs_rescore
        ]
        for number, plan in enumerate(plans):
            progress("kinds of index", number, len(plans))
            found, result = measure(plan, vectors, queries, exact, build_threads)
            exact = found if exact is None else exact
            measured.append(result)
    title = (
        f"{len(queries.vectors)} queries of {args.split}, {meta.num_docs} documents, width {meta.width}, score "
        f"{folder.config.model.score}; built with {build_threads} threads, searched with one"
    )
    show(title, measured)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"about": title, "indexes": [asdict(result) for result in measured]})


def queries_of(encoders: Encoders, dataset: Dataset, split: str, wanted: int) -> Queries:
    """Return `wanted` rows of a split, or all where it has fewer."""
    taken = np.linspace(0, dataset.num_rows(split) - 1, min(wanted, dataset.num_rows(split))).astype(np.int64)
    vectors, seen, right = [], [], []
    for rows in dataset.iterate(split, ROWS_AT_ONCE):
        inside = np.flatnonzero(np.isin(rows.row_ids, taken) & (rows.relevance > 0))
        if len(inside):
            vectors.append(encoders.queries(rows).numpy()[inside])
            seen += [seen_of(rows, i) for i in inside.tolist()]
            right.append(rows.doc_rows[inside])
    return Queries(np.concatenate(vectors), seen, np.concatenate(right).astype(np.int64))


def seen_of(rows: Rows, i: int) -> np.ndarray:
    return np.setdiff1d(rows.seen(i), rows.doc_rows[i])  # a film that comes again may be found


def measure(
    plan: VectorsMeta, vectors: np.ndarray, queries: Queries, exact: np.ndarray | None, threads: int
) -> tuple[np.ndarray, Measured]:
    """Return what an index finds, int64 [m, TOP], and what it costs; `exact` is what it should find."""
    faiss.omp_set_num_threads(threads)
    started = time.perf_counter()
    whole = CodedVectors(coded(vectors, plan.dtype), plan.dtype, vectors.shape[1])
    searched = whole if not plan.whole else CodedVectors(cut_like(whole[:], plan), "float32", plan.width)
    made = index_type(plan.kind, plan.options).build(searched)
    build_s = time.perf_counter() - started
    faiss.omp_set_num_threads(1)
    names = pa.chunked_array([pa.nulls(0, pa.string())])
    index = Index(made, plan, names, names, whole if plan.rescored else None)
    found, seconds = [], []
    for vector, seen in zip(queries.vectors[:, None], queries.seen, strict=True):
        started = time.perf_counter()
        found.append(index.nearest(vector, TOP, plan.model_checksum, [seen])[1][0])
        seconds.append(time.perf_counter() - started)
    rows = np.stack(found)
    wanted = rows if exact is None else exact
    same = [np.intersect1d(a[a >= 0], b[b >= 0]).size for a, b in zip(rows, wanted, strict=True)]
    recall = float(np.mean(same / np.maximum(1, (wanted >= 0).sum(axis=1))))
    place = rows == queries.right[:, None]
    ranks = np.where(place.any(axis=1), place.argmax(axis=1) + 1.0, np.inf)
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    size = faiss.serialize_index(made).nbytes / plan.num_docs
    on_disk = bytes_per_vector(plan.dtype, whole.width) if plan.rescored else 0
    ndcg = mean_metrics(ranks)["ndcg_at_10"]
    name = f"{plan.kind}{f' {plan.width - 1}' if plan.whole else ''}{f' × {plan.rescored}' if plan.rescored else ''}"
    name += "" if plan.dtype == "float32" else f" of {plan.dtype}"
    return rows, Measured(name, recall, ndcg, float(p50), float(p99), size, on_disk, build_s)


def show(title: str, measured: list[Measured]) -> None:
    table = Table(title=title)
    for column in ("index", "Recall@100", "NDCG@10", "p50 ms", "p99 ms", "bytes a vector", "on disk", "build s"):
        table.add_column(column, justify="left" if column == "index" else "right")
    for m in measured:
        table.add_row(
            m.kind, f"{m.recall_at_100:.3f}", f"{m.ndcg_at_10:.4f}", f"{m.p50_ms:.2f}", f"{m.p99_ms:.2f}",
            f"{m.bytes_per_vector:.0f}", str(m.bytes_on_disk), f"{m.build_s:.1f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_main(main))
