"""Measure batch recommendation over a synthetic catalogue: queries per second by index type.

    python tools/bench/bench_recommend.py --out runs/bench_recommend [--users 100000] [--documents 200000]

Users have 5 to 15 events, with a skewed popularity of documents. The model is untrained, which does not affect the
cost. An existing dataset and vectors in --out are reused.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from pyarrow import parquet

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.cli import run_main
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.ingest.api import make_dataset
from bigdssm.models import new_model
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.index_types import INDEX_TYPES
from bigdssm.retrieval.recommend import RecommendOptions, Users, recommend
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.utils.log import ProgressBar

YEARS = (1960, 2020)
CONFIG = {
    "query": {"history": {"type": "history", "of": "item_id", "max_items": 10}, "age": {"type": "numeric"}},
    "doc": {"item_id": {"type": "categorical"}, "year": {"type": "numeric"}},
}
FILTERS = (None, "year >= 2000", "year = 1987")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for dataset, model, indexes and results")
    parser.add_argument("--users", type=int, default=100_000, help="number of users (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=200_000, help="number of documents (default: %(default)s)")
    parser.add_argument("--top", type=int, default=10, help="documents per query (default: %(default)s)")
    parser.add_argument(
        "--types", nargs="+", choices=INDEX_TYPES.names(), default=["flat"], help="index types (default: %(default)s)"
    )
    args = parser.parse_args()
    if not (args.out / "vectors").exists():
        prepare(args.out, args.users, args.documents)
    folder, dataset = load_model_folder(args.out / "model"), Dataset.open(args.out / "dataset")
    print(f"{dataset.catalogue.num_docs:,} documents, top {args.top}, {torch.get_num_threads()} threads")
    for kind in args.types:
        build_index(args.out / "vectors", args.out / "index", kind)
        index = open_index(args.out / "index")
        for condition in FILTERS:
            shutil.rmtree(args.out / "found", ignore_errors=True)
            used = time.process_time()
            with ProgressBar() as progress:
                done = recommend(
                    args.out / "found", folder, index, dataset, Users(dataset), RecommendOptions(args.top, condition),
                    Share(progress=progress),
                )  # fmt: skip
            used = time.process_time() - used
            rate = f"{done.queries:,} queries in {done.seconds:.1f} s, {done.queries / done.seconds:,.0f} per second"
            rate += f"; {used:.1f} CPU-seconds"
            print(f"{kind}, {condition or 'no filter'}: {rate}", flush=True)


def prepare(out: Path, num_users: int, num_docs: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    keys = [f"d{i}" for i in range(num_docs)]
    items = pa.table({"item_id": keys, "year": random.randint(*YEARS, num_docs).astype(np.float64)})
    users = pa.table({"user_id": [f"u{i}" for i in range(num_users)], "age": random.randint(18, 80, num_users) * 1.0})
    lengths = random.randint(5, 16, num_users)
    user = np.repeat(np.arange(num_users), lengths)
    item = (num_docs * random.rand(len(user)) ** 3).astype(np.int64)
    events = pa.table(
        {
            "user_id": users["user_id"].combine_chunks().take(pa.array(user)),
            "item_id": pa.array(keys).take(pa.array(item)), "timestamp": 1.7e9 + np.arange(len(user)),
        }
    )  # fmt: skip
    data = {**CONFIG, "dir": str(out / "dataset")}
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(out)}, "data": data, "model": {"dim": 64, "beta": "document"}}))
    for name, table in (("events", events), ("items", items), ("users", users)):
        parquet.write_table(table, out / f"{name}.parquet")
    make_dataset(
        path, interactions=out / "events.parquet", items=out / "items.parquet", users=out / "users.parquet",
        rating_column=None, overwrite=True,
    )  # fmt: skip
    config, dataset = load_config(path), Dataset.open(out / "dataset")
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    save_model_folder(out / "model", model, config, dataset.schema, dataset.tokenizer_dir, {})
    folder = load_model_folder(out / "model")
    write_vectors(out / "vectors", tower_encoders(folder.model, dataset), dataset, folder.checksum)


if __name__ == "__main__":
    sys.exit(run_main(main))
