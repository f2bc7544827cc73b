"""How many queries a second rows of sequences give, on made-up events.

    python tools/bench/bench_sequences.py --config configs/movielens_1m.yaml --out sequences.json

An epoch of the config is trained by the command line, with its own model, loss and pieces, on `--ranks` ranks of one
thread each. Users have 20 events and more, their numbers log-normal as MovieLens-1M's are (165 on average); what they
meet is drawn at random, popular items more often. The figures are the metrics', without checkpoint and validation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bigdssm.cli import at_least, run_main
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.distributed import free_port
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "movielens_1m.yaml")
    parser.add_argument("--users", type=at_least(1), default=1500)
    parser.add_argument("--items", type=at_least(1), default=3416)
    parser.add_argument("--ranks", type=at_least(1), default=2)
    parser.add_argument("--out", type=Path, metavar="JSON", required=True)
    args = parser.parse_args()
    return run_main(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    """Make the data, train, and write what the metrics say."""
    with tempfile.TemporaryDirectory(prefix="bench-sequences-") as folder:
        place = Path(folder)
        write_tables(place, args.users, args.items)
        tables = InteractionTables(place / "events.tsv", place / "items.tsv", time_column="position")
        make_interactions(load_config(args.config).data, tables, IngestTarget(place / "dataset"))
        train(args, place)
        dataset = Dataset.open(place / "dataset")
        queries, rows = dataset.num_queries("train"), dataset.num_rows("train")
        lines = (place / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    before = [0, *(record["step"] for record in records[:-1])]
    rows_global = load_config(args.config).pretrain.rows_global
    seconds = sum(
        (record["step"] - first) * rows_global / record["rows_per_s"]
        for first, record in zip(before, records, strict=True)
    )
    trained = records[-1]["step"] * rows_global * queries / rows
    found = {
        "config": args.config.name, "ranks": args.ranks, "rows": rows, "queries": queries, "documents": args.items,
        "queries_per_s": round(trained / seconds), "seconds_per_million": round(1e6 * seconds / trained, 1),
        "memory_gb": records[-1]["memory_gb"], "padding_fraction": records[-1]["padding_fraction"],
    }  # fmt: skip
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def write_tables(folder: Path, users: int, items: int) -> None:
    """Write events and items."""
    random = np.random.RandomState(0)
    lengths = np.minimum(2000, 20 + np.exp(random.normal(4.6, 0.95, users))).astype(int)
    events = ["user_id\titem_id\tposition"]
    for user, length in enumerate(lengths.tolist()):
        met = (items * random.rand(length) ** 2).astype(int).tolist()
        events += [f"{user}\t{item}\t{position}" for position, item in enumerate(met)]
    (folder / "events.tsv").write_text("\n".join(events) + "\n")
    (folder / "items.tsv").write_text("item_id\n" + "".join(f"{item}\n" for item in range(items)))


def train(args: argparse.Namespace, folder: Path) -> None:
    """Train an epoch."""
    command = [
        Path(sys.executable).with_name("deepspeed"), "--num_gpus", str(args.ranks), "--master_port", str(free_port()),
        ROOT / "launch" / "pretrain.py", "--config", args.config, f"run.dir={folder / 'run'}", "run.trackers=[]",
        f"data.dir={folder / 'dataset'}", "pretrain.epochs=1", "pretrain.validate_every_steps=0",
        "pretrain.log_every_steps=8",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
