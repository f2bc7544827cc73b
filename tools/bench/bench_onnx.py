"""Compare an exported ONNX query tower with the original: NDCG, and single-query latency on one thread.

    python tools/bench/bench_onnx.py --onnx FOLDER --model MODEL --vectors VECTORS --data DATASET [--split test]

FOLDER is the output of bigdssm convert_checkpoint --format onnx for MODEL. Queries are evenly spaced rows of the split,
encoded one by one; NDCG@10 is over all documents of VECTORS except seen ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import at_least, run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.evaluation.evaluate import Pairs, ranks_of_vectors
from bigdssm.evaluation.metrics import mean_metrics, paired_bootstrap, row_metrics
from bigdssm.export.onnx_model import onnx_session, read_export, run_onnx
from bigdssm.loader.batch import Collator, Features
from bigdssm.retrieval.embed import query_vectors
from bigdssm.retrieval.vectors import read_vectors

WARM_UP = 20
ROWS_PER_BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, metavar="FOLDER", help="exported folder")
    parser.add_argument("--model", type=Path, required=True, help="model folder of the export")
    parser.add_argument("--vectors", type=Path, required=True, help="folder written by bigdssm embed")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--split", default="test", help="split of the queries (default: %(default)s)")
    parser.add_argument("--queries", type=at_least(1), default=1000, help="number of queries (default: %(default)s)")
    args = parser.parse_args()
    if args.queries < 1:
        raise ConfigError(f"--queries {args.queries}: needs at least 1")
    folder, dataset = load_model_folder(args.model), Dataset.open(args.data)
    dataset = folder.view(dataset)
    if read_export(args.onnx).get("model_checksum") != folder.checksum:
        raise CheckpointError(f"{args.onnx} is an export of another model than {args.model}; export this one")

    torch.set_num_threads(1)
    documents = torch.from_numpy(read_vectors(args.vectors, folder.doc_checksum, dataset))
    queries, target, seen, query_ids = queries_of(dataset, args.split, args.queries)
    systems: dict[str, Callable[[Features], Tensor]] = {"torch": partial(query_vectors, folder.model)}
    for file in ("query.onnx", "query.int8.onnx"):
        size = f"{(args.onnx / file).stat().st_size / 1e6:.1f} MB"
        systems[f"{file}, {size}"] = partial(run_onnx, onnx_session(args.onnx / file, threads=1))

    table = Table(title=f"{len(queries)} queries of {args.split} one by one, {len(documents)} documents, one thread")
    for column in ("query tower", "NDCG@10", "less torch", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "query tower" else "right")
    first = None
    for name, encode in systems.items():
        vectors, seconds = one_by_one(encode, queries)
        ranks = ranks_of_vectors(vectors, documents, target, seen).numpy()
        ndcg = row_metrics(ranks)["ndcg_at_10"]
        less = "" if first is None else str(paired_bootstrap(ndcg, first, query_ids))
        first = ndcg if first is None else first
        p50, p99 = np.percentile(seconds, [50, 99]) * 1000
        table.add_row(name, f"{mean_metrics(ranks)['ndcg_at_10']:.4f}", less, f"{p50:.2f}", f"{p99:.2f}")
    Console().print(table)


def queries_of(dataset: Dataset, split: str, number: int) -> tuple[list[Features], Tensor, Pairs, np.ndarray]:
    """Return features, target documents, seen documents and query ids of `number` rows of a split."""
    selected = np.linspace(0, dataset.num_rows(split) - 1, min(number, dataset.num_rows(split))).astype(np.int64)
    collator = Collator(dataset.schema, dataset.catalogue)
    queries, target, seen, query_ids = [], [], [], []
    for rows in dataset.iterate(split, ROWS_PER_BATCH):
        for i in np.flatnonzero(np.isin(rows.row_ids, selected) & (rows.relevance > 0)):
            row: Rows = rows.take(np.array([i]))
            queries.append(collator.query_features(row.query))
            target.append(int(row.doc_rows[0]))
            seen.append(row.seen(0))
            query_ids.append(int(row.query_ids[0]))
    query_of = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(documents) for documents in seen]))
    all_seen = query_of, torch.from_numpy(np.concatenate(seen).astype(np.int64))
    return queries, torch.tensor(target), all_seen, np.array(query_ids)


def one_by_one(encode: Callable[[Features], Tensor], queries: list[Features]) -> tuple[Tensor, np.ndarray]:
    """Return the vectors [m, D+1] and the seconds per query."""
    for query in queries[:WARM_UP]:
        encode(query)
    vectors, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        vectors.append(encode(query))
        seconds.append(time.perf_counter() - started)
    return torch.cat(vectors), np.array(seconds)


if __name__ == "__main__":
    sys.exit(run_main(main))
