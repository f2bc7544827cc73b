"""Measure ingestion: seconds, CPU time, memory and disk, of synthetic events or of text pairs.

    python tools/bench/bench_ingestion.py --events 1e7                      # 15 s, 2 GB of temporary disk space
    python tools/bench/bench_ingestion.py --events 1e8 --pieces 50          # minutes, many GB
    python tools/bench/bench_ingestion.py --events 1e7 --append 1e6         # the second line is the appended partition
    python tools/bench/bench_ingestion.py --events 1e7 --engine spark       # JVM and session are a separate step
    python tools/bench/bench_ingestion.py --pairs ../shared/data/debian_packages/packages.jsonl.xz --repeat 6

An event is a user (one of events / 50), an item (of at most 200,000, with skewed popularity) and a time within 300
days, unordered: 64-bit integers in Parquet, split by time. Pairs are those of configs/debian_packages.yaml with a
tokenizer trained on them, repeated with the number of the repetition in every text, so that all documents are distinct.
Memory is the peak of the private (anonymous) memory of all processes, disk the peak of tables, spool and dataset; both
are sampled five times per second.
"""

from __future__ import annotations

import argparse
import lzma
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from bigdssm.ingest.api import make_dataset
from bigdssm.ingest.engines import LocalEngine

EVENTS_PER_USER, MAX_ITEMS, DAYS, ROWS_PER_GROUP, ROWS_PER_FILE = 50, 200_000, 300, 1 << 20, 10_000_000
TEXTS = ("package", "synopsis", "description")
CONFIG = """
run: {dir: unused}
data:
  dir: unused
  query: {past: {type: history, of: item_id, max_items: 50}}
  doc: {item_id: {type: categorical}, kind: {type: categorical}}
model: {query: {history: {positions: relative}}}
"""
PAIRS_CONFIG = Path(__file__).parents[2] / "configs/debian_packages.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--events", type=float, help="number of synthetic events")
    source.add_argument("--pairs", type=Path, help="file of Debian packages")
    parser.add_argument("--append", type=float, help="number of events in a second partition (default: none)")
    parser.add_argument("--versions", type=int, help="versions per item, with the start of their validity (default: 1)")
    parser.add_argument("--pieces", type=int, default=1, help="data.targets_per_row (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of the pairs (default: %(default)s)")
    parser.add_argument(
        "--engine", choices=("built-in", "spark"), default="built-in", help="ingestion engine (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=0, help="processes, or N of Spark's local[N]; 0: one per core (default: 0)"
    )
    parser.add_argument("--folder", type=Path, help="folder for all files (default: the system's temporary folder)")
    args = parser.parse_args()
    how: dict[str, Any] = {"engine": args.engine}
    if args.engine == "spark":
        how["master"] = f"local[{args.processes or '*'}]"
    else:
        how["processes"] = args.processes
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG)
        how["out"] = folder / "dataset"
        if args.pairs:
            write_pairs(args.pairs, folder / "pairs.parquet", args.repeat)
            overrides = ["data.tokenizer.path=null", "model.query.text.init=null"]
            measured(folder, PAIRS_CONFIG, overrides, pairs=folder / "pairs.parquet", doc_id_column="package", **how)
            return
        how["overrides"] = [f"data.targets_per_row={args.pieces}"]
        parts = [int(args.events), *([int(args.append)] if args.append else [])]
        for number, events in enumerate(parts):
            tables = write_events(folder / str(number), events, parts[0], number, args.versions)
            how["items_time_column"] = "since" if args.versions else None
            part: dict[str, Any] = {"append": number > 0, "partition": f"part{number}", **tables}
            measured(folder, folder / "config.yaml", split="time", **part, **how)


def write_events(folder: Path, number: int, scale: int, seed: int, versions: int | None) -> dict[str, Path]:
    """Write `number` events; `scale` determines the numbers of users and items."""
    (folder / "events").mkdir(parents=True)
    users, items = scale // EVENTS_PER_USER, min(MAX_ITEMS, scale // EVENTS_PER_USER)
    random = np.random.default_rng(seed)
    for first in range(0, number, ROWS_PER_FILE):
        rows = min(ROWS_PER_FILE, number - first)
        columns = {
            "user_id": (users * random.random(rows) ** 1.5).astype(np.int64),
            "item_id": (items * random.random(rows) ** 2.5).astype(np.int64),
            "timestamp": random.integers(0, DAYS * 86_400, rows) + (1_600_000_000 + seed * DAYS * 86_400),
        }
        pq.write_table(pa.table(columns), folder / "events" / f"{first:012d}.parquet", row_group_size=ROWS_PER_GROUP)
    item = np.repeat(np.arange(items), versions or 1)
    since = random.integers(0, DAYS * 86_400, len(item)) + (1_600_000_000 + seed * DAYS * 86_400)
    kind = random.integers(0, 37, len(item)) if versions else item % 37
    catalogue = pa.table({"item_id": item, "kind": kind, "since": since})
    pq.write_table(catalogue, folder / "items.parquet")
    return {"interactions": folder / "events", "items": folder / "items.parquet"}


def write_pairs(source: Path, target: Path, repeat: int) -> None:
    """Write a table of the packages, repeated."""
    with lzma.open(source) as lines:
        table = pa.json.read_json(lines, pa.json.ReadOptions(block_size=64 << 20))
    with pq.ParquetWriter(target, table.schema) as writer:
        for number in range(repeat):
            for name in TEXTS:
                ending = pc.binary_join_element_wise(table[name], f"{number}", " ")
                table = table.set_column(table.schema.get_field_index(name), name, ending)
            writer.write_table(table, row_group_size=1 << 14)


def measured(folder: Path, config: Path, overrides: list[str], **options: Any) -> None:
    """Build a dataset in a subprocess, and print its cost."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=(config, overrides, options))
    process.start()
    memory, disk, ticks = 0.0, 0.0, dict[int, int]()
    while process.is_alive():
        pids = descendants(int(process.pid or 0))
        memory = max(memory, sum(anonymous_mb(pid) for pid in pids))
        ticks |= {pid: spent for pid in pids if (spent := processor_ticks(pid))}
        disk = max(disk, disk_mb(folder))
        process.join(0.2)
    if process.exitcode:
        raise SystemExit(f"the ingestion ended with exit code {process.exitcode}")
    seconds = sum(ticks.values()) / os.sysconf("SC_CLK_TCK")
    print(f"  {seconds:.1f} CPU-seconds, {memory:,.0f} MB of memory, {disk:,.0f} MB on disk", flush=True)


def make(config: Path, overrides: list[str], options: dict[str, Any]) -> None:
    """Build a dataset, and print the seconds per step."""
    spent: dict[str, float] = {}
    start_ticks = 0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def measuring(engine: LocalEngine, step: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal start_ticks
            since = time.perf_counter()
            if not spent:
                spent["start"] = since - begin
                start_ticks = sum(map(processor_ticks, descendants(os.getpid())))
            result = method(engine, step, *args, **kwargs)
            spent[step] = time.perf_counter() - since
            return result

        return measuring

    for name in ("map", "select"):
        setattr(LocalEngine, name, timed(getattr(LocalEngine, name)))
    begin = time.perf_counter()
    report = make_dataset(config, overrides, **options)
    seconds = time.perf_counter() - begin
    spent["the rest"] = seconds - sum(spent.values())
    print(f"{report.partition}: {sum(report.rows.values()):,} rows in {seconds:.1f} s", flush=True)
    print("  " + ", ".join(f"{step} {took:.1f}" for step, took in spent.items() if took > 0.1), flush=True)
    print(f"  start: {start_ticks / os.sysconf('SC_CLK_TCK'):.1f} CPU-seconds including imports", flush=True)


def descendants(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    parents = {int(path.name): parent_of(path) for path in Path("/proc").glob("[0-9]*")}
    pids, more = set[int](), {pid}
    while more:
        pids |= more
        more = {child for child, parent in parents.items() if parent in pids} - pids
    return pids


def stat(path: Path) -> list[str]:
    """Return the fields of /proc/PID/stat after the command name; zeros if the process has ended."""
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 50


def parent_of(path: Path) -> int:
    return int(stat(path)[1])


def processor_ticks(pid: int) -> int:
    user, system = stat(Path("/proc") / str(pid))[11:13]
    return int(user) + int(system)


def anonymous_mb(pid: int) -> float:
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def disk_mb(folder: Path) -> float:
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # renamed or removed meanwhile
                size += os.stat(os.path.join(path, name)).st_blocks * 512
    return size / 1e6


if __name__ == "__main__":
    main()
