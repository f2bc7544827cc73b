"""Measure the training throughput (queries/s) of sequence rows on synthetic events.

    python tools/bench/bench_sequences.py --config configs/movielens_1m.yaml --out sequences.json

Trains one epoch of the config with the command line, on `--ranks` ranks with one thread each. Users have 20 events or
more, with log-normal counts as in MovieLens-1M (165 on average); items are sampled at random, popular ones more often.
Half of the events have the time of the event before them. The results come from metrics.jsonl, without checkpoints and
validation; `cpu_seconds` are those of the training command, including its start.
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
FIRST_TIME = 956_703_932  # April 2000, in seconds since 1970


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "movielens_1m.yaml", help="YAML file (default: movielens_1m)"
    )
    parser.add_argument("--users", type=at_least(1), default=1500, help="number of users (default: %(default)s)")
    parser.add_argument("--items", type=at_least(1), default=3706, help="number of items (default: %(default)s)")
    parser.add_argument("--ranks", type=at_least(1), default=2, help="number of ranks (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON", required=True, help="file for the results")
    args = parser.parse_args()
    return run_main(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    """Build the dataset, train, and write the throughput."""
    with tempfile.TemporaryDirectory(prefix="bench-sequences-") as name:
        folder = Path(name)
        write_tables(folder, args.users, args.items)
        tables = InteractionTables(folder / "events.tsv", folder / "items.tsv")
        make_interactions(load_config(args.config).data, tables, IngestTarget(folder / "dataset"))
        before = os.times()
        train(args, folder)
        after = os.times()
        dataset = Dataset.open(folder / "dataset")
        queries, rows = dataset.num_queries("train"), dataset.num_rows("train")
        lines = (folder / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    steps_before = [0, *(record["step"] for record in records[:-1])]
    rows_global = load_config(args.config).pretrain.rows_global
    seconds = sum(
        (record["step"] - first) * rows_global / record["rows_per_s"]
        for first, record in zip(steps_before, records, strict=True)
    )
    trained = records[-1]["step"] * rows_global * queries / rows
    result = {
        "config": args.config.name, "ranks": args.ranks, "rows": rows, "queries": queries, "documents": args.items,
        "queries_per_s": round(trained / seconds), "seconds_per_million": round(1e6 * seconds / trained, 1),
        "cpu_seconds": round(
            after.children_user + after.children_system - before.children_user - before.children_system
        ),
        "memory_gb": records[-1]["memory_gb"], "padding_fraction": records[-1]["padding_fraction"],
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_tables(folder: Path, users: int, items: int) -> None:
    """Write synthetic tables of events and items."""
    random = np.random.RandomState(0)
    lengths = np.minimum(2000, 20 + np.exp(random.normal(4.6, 0.95, users))).astype(int)
    events = ["user_id\titem_id\ttimestamp"]
    for user, length in enumerate(lengths.tolist()):
        history = (items * random.rand(length) ** 2).astype(int).tolist()
        gaps = np.exp(random.normal(3.0, 2.0, length)) * (random.rand(length) < 0.5)
        times = (FIRST_TIME + np.cumsum(np.ceil(gaps))).astype(int).tolist()
        events += [f"{user}\t{item}\t{time}" for item, time in zip(history, times, strict=True)]
    (folder / "events.tsv").write_text("\n".join(events) + "\n")
    (folder / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{item}\tItem {item}\n" for item in range(items)))


def train(args: argparse.Namespace, folder: Path) -> None:
    """Train one epoch."""
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
