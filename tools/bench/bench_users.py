"""Train a table of users by rows, end to end, on made-up events: time and memory of each command.

    python tools/bench/bench_users.py --out FOLDER [--users 1000000] [--items 100000] [--steps 300]

Each user has three to nine events over a year, with items of one group of 100; the newest ones are for validation and
test. The query has the user's id alone, so that only the user table can rank. The commands are those of the
documentation: make_shards, pretrain on two ranks, evaluate, embed, build_index, and recommend for all users. Memory is
the highest sum of resident sizes over the processes of a command; shared pages count once per process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bigdssm.cli import at_least

GROUP = 100  # items
SPLIT = ("--validation-fraction", "0.002", "--test-fraction", "0.005")
CONFIG = {
    "data": {
        "query": {"user_id": {"type": "categorical"}},
        "doc": {"item_id": {"type": "categorical"}},
        "exclude_seen": False,
    },
    "model": {
        "dim": 64, "beta": "document", "tables": {"sharding": "rows"},
        "query": {"mlp": [], "embedding_dim": 64}, "doc": {"mlp": [], "embedding_dim": 64},
    },
    "pretrain": {
        "rows_global": 16_384, "table_optimizer": {"name": "lazy_adam", "lr": 0.01}, "optimizer": {"lr": 0.002},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for all files")
    for name, value in (("users", 1_000_000), ("items", 100_000), ("steps", 300), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=at_least(1), default=value, help="(default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    events = write_tables(args)
    config, model = args.out / "config.yaml", args.out / "run" / "pretrain" / "best"
    content = {
        **CONFIG,
        "run": {"dir": str(args.out / "run"), "trackers": []},
        "data": {**CONFIG["data"], "dir": str(args.out / "dataset")},
        "pretrain": {**CONFIG["pretrain"], "steps": args.steps},
    }
    config.write_text(yaml.safe_dump(content))
    tables = [f"--{name}={args.out / name}.parquet" for name in ("interactions", "items", "users")]
    print(f"{args.users:,} users, {args.items:,} items, {events:,} events")
    for command in (
        ["make_shards", "interactions", "--config", config, *tables, "--split", "time", *SPLIT],
        ["pretrain", "--config", config, "--ranks", args.ranks],
        ["evaluate", "--model", model, "--data", args.out / "dataset", "--split", "test"],
        ["embed", "--model", model, "--data", args.out / "dataset", "--out", args.out / "vectors"],
        ["build_index", "--vectors", args.out / "vectors", "--out", args.out / "index"],
        ["recommend", "--model", model, "--index", args.out / "index", "--users", "--out", args.out / "top"],
    ):
        measure([str(word) for word in command], args.out)


def write_tables(args: argparse.Namespace) -> int:
    """Write users, items and events; return the number of events."""
    random = np.random.RandomState(0)
    users, items = np.arange(args.users), np.arange(args.items)
    counts = random.randint(3, 10, args.users)
    of_event = np.repeat(users, counts)
    group = random.randint(0, args.items // GROUP, args.users)
    within = (GROUP * random.random_sample(len(of_event)) ** 2).astype(np.int64)  # some are more popular
    item = group[of_event] * GROUP + within
    timestamp = random.randint(0, 365 * 86_400, len(of_event))
    pq.write_table(pa.table({"user_id": _names("u", users)}), args.out / "users.parquet")
    pq.write_table(pa.table({"item_id": _names("i", items)}), args.out / "items.parquet")
    columns = {"user_id": _names("u", of_event), "item_id": _names("i", item), "timestamp": 1_700_000_000 + timestamp}
    pq.write_table(pa.table(columns), args.out / "interactions.parquet")
    return len(of_event)


def _names(letter: str, numbers: np.ndarray) -> np.ndarray:
    names: np.ndarray = np.char.add(letter, numbers.astype(str))
    return names


def measure(words: list[str], out: Path) -> None:
    """Run a command; print its time, its memory and, of an evaluation, its metrics."""
    started, peak, log = time.monotonic(), [0], out / f"{words[0]}.log"
    with log.open("w") as file:
        process = psutil.Popen(
            [Path(sys.executable).with_name("bigdssm"), *words], stdout=file, stderr=subprocess.STDOUT
        )

        def watch() -> None:
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                try:
                    parts = [process, *process.children(recursive=True)]
                    peak[0] = max(peak[0], sum(part.memory_info().rss for part in parts))
                except psutil.NoSuchProcess:
                    pass  # ended meanwhile
                time.sleep(0.2)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        code = process.wait()
        watching.join()
    if code:
        sys.exit(f"{' '.join(words)}: exit code {code}; see {log}")
    print(f"| {words[0]} | {time.monotonic() - started:.0f} s | {peak[0] / 1e9:.1f} GB |", flush=True)
    if words[0] == "evaluate":
        print(log.read_text())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
