"""Measure the latency of encoding single queries on one thread.

    python tools/bench/bench_query.py --model MODEL --data DATASET [--split test] [--queries 500] [--out JSON]

Queries are the first rows of the split; the first ten warm up. Reading from the dataset is not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import at_least, run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.utils.atomic import write_json

WARM_UP = 10  # queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--split", default="test", help="split of the queries (default: %(default)s)")
    parser.add_argument("--queries", type=at_least(1), default=500, help="number of queries (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="file for the results (default: printed only)")
    args = parser.parse_args()
    folder, dataset = load_model_folder(args.model), Dataset.open(args.data)
    dataset = folder.view(dataset)
    torch.set_num_threads(1)
    encode, seconds = tower_encoders(folder.model, dataset).queries, []
    for rows in islice(dataset.iterate(args.split, 1), WARM_UP + args.queries):
        started = time.perf_counter()
        encode(rows)
        seconds.append(time.perf_counter() - started)
    timed = seconds[min(WARM_UP, len(seconds) - 1) :]
    p50, p99 = np.percentile(timed, [50, 99]) * 1000
    about = f"{len(timed)} queries of {args.split}, one thread: p50 {p50:.2f} ms, p99 {p99:.2f} ms"
    Console().print(about)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"about": about, "queries": [{"p50 ms": float(p50), "p99 ms": float(p99)}]})


if __name__ == "__main__":
    sys.exit(run_main(main))
