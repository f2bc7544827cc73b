"""Measure a run over very many pairs of ids: seconds, memory of each process, and disk, per part.

    python tools/bench/bench_billion.py --pairs 1e7 --folder /scratch               # minutes
    python tools/bench/bench_billion.py --pairs 1e9 --folder /scratch --out billion.json     # hours, 60 GB

A pair is a user and an item: hashes of a counter, items with a Zipf-like popularity. Tables are Parquet files of 10⁷
rows. The parts: ingestion with the built-in engine; `inspect_shards --verify`; half of the steps of pretraining on two
ranks with sharded tables (`deepspeed launch/pretrain.py`), which are then killed; the other half on one rank, from the
last checkpoint, with a validation over all items; a second partition of a hundredth of the pairs; vectors of all
items. Memory is the largest private (anonymous) memory of a process, sampled twice per second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_ingestion import anonymous_mb, descendants, disk_mb, processor_ticks

from bigdssm.distributed import free_port
from bigdssm.utils.hashing import mix64

ROOT = Path(__file__).resolve().parents[2]
ROWS_PER_FILE, ROWS_PER_GROUP = 10_000_000, 1 << 20
HELD_OUT_ROWS = 500  # of validation, and of test
CONFIG = """
run: {{dir: {folder}/run, trackers: []}}
data:
  dir: {folder}/dataset
  lanes: 8
  num_workers: 0
  query: {{user_id: {{type: categorical}}}}
  doc: {{item_id: {{type: categorical}}}}
model:
  dim: 32
  query: {{embedding_dim: 32, mlp: []}}
  doc: {{embedding_dim: 32, mlp: []}}
  tables: {{sharding: rows}}
engine: {{table_memory: {memory}}}
pretrain:
  rows_global: 1024
  steps: {steps}
  log_every_steps: 50
  save_every_steps: {save_every}
  optimizer: {{lr: 1.0e-3}}
  table_optimizer: {{name: rowwise_adagrad, lr: 0.05}}
"""


@dataclass
class Part:
    """The cost of one part."""

    name: str
    seconds: float
    cpu_seconds: float
    largest_process_mb: float
    all_processes_mb: float
    disk_mb: float  # of the folder, at the end
    facts: dict[str, Any]


class Bench:
    """Runs the parts in a folder, and records their cost."""

    def __init__(self, folder: Path, pairs: int, items: int, users: int) -> None:
        self.folder, self.pairs, self.items, self.users = folder, pairs, items, users
        self.parts: list[Part] = []

    def command(
        self, name: str, line: list[str], *, kill_when: Callable[[], bool] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command to its end, or until `kill_when`; exit if it fails."""
        started, ticks = time.perf_counter(), dict[int, int]()
        largest = total = 0.0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        log = self.folder / f"{name.replace(' ', '_')}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            killed = False
            while process.poll() is None:
                pids = descendants(process.pid)
                memory = [anonymous_mb(pid) for pid in pids]
                largest, total = max(largest, *memory), max(total, sum(memory))
                ticks |= {pid: spent for pid in pids if (spent := processor_ticks(pid))}
                if kill_when is not None and kill_when():
                    for pid in pids:
                        os.kill(pid, signal.SIGKILL)
                    killed = True
                time.sleep(0.5)
        if process.returncode and not killed:
            raise SystemExit(f"{name} ended with exit code {process.returncode}; see {log}")
        seconds = time.perf_counter() - started
        cpu_seconds = sum(ticks.values()) / os.sysconf("SC_CLK_TCK")
        self.add(Part(name, seconds, cpu_seconds, largest, total, disk_mb(self.folder), {}))
        return process

    def add(self, part: Part) -> None:
        """Record a part, and print it."""
        self.parts.append(part)
        print(
            f"{part.name:32} {part.seconds:9.1f} s {part.cpu_seconds:9.1f} CPU-s {part.largest_process_mb:8,.0f} MB "
            f"{part.all_processes_mb:8,.0f} MB in all {part.disk_mb / 1000:8.1f} GB on disk",
            flush=True,
        )

    def write_tables(self, name: str, first: int, number: int) -> Path:
        """Write the pairs with the counters [first, first + number)."""
        started, spent = time.perf_counter(), time.process_time()
        tables = self.folder / name
        tables.mkdir()
        for begin in range(first, first + number, ROWS_PER_FILE):
            end = min(begin + ROWS_PER_FILE, first + number)
            table = pa.table(self.columns(begin, end))
            pq.write_table(table, tables / f"{begin:014d}.parquet", row_group_size=ROWS_PER_GROUP)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - spent
        self.add(Part(f"tables of {name}", seconds, cpu_seconds, 0, 0, disk_mb(self.folder), {"pairs": number}))
        return tables

    def columns(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """Return the users and items of counters: uniform users, items by a power law."""
        counters = np.arange(begin, end, dtype=np.uint64)
        uniform = (mix64(counters, 1) >> np.uint64(11)) * 2.0**-53
        item = np.minimum(self.items**uniform, self.items - 1).astype(np.int64)  # density 1 / item
        return {"user_id": (mix64(counters, 2) % np.uint64(self.users)).astype(np.int64), "item_id": item}

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the run."""
        file = self.folder / "run/pretrain/metrics.jsonl"
        if file.exists():
            for line in file.read_text().splitlines():
                yield json.loads(line)

    def last_step(self) -> int:
        """Return the last recorded step."""
        return max((int(record["step"]) for record in self.metrics()), default=0)

    def rates(self, first: int, last: int) -> dict[str, float]:
        """Return the rows per second at the start, in the middle and at the end of steps (first, last]."""
        found = [r["rows_per_s"] for r in self.metrics() if "rows_per_s" in r and first < r["step"] <= last]
        return {} if not found else {"start": found[0], "middle": found[len(found) // 2], "end": found[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=float, default=1e7, help="number of pairs (default: %(default)s)")
    parser.add_argument("--users", type=float, default=1e7, help="(default: %(default)s)")
    parser.add_argument("--items", type=float, default=1e7, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of pretraining (default: %(default)s)")
    parser.add_argument("--memory", choices=("host", "file"), default="host", help="engine.table_memory")
    parser.add_argument("--folder", type=Path, required=True, help="folder for all files; it must not exist")
    parser.add_argument("--out", type=Path, metavar="JSON", help="file for the figures (default: printed only)")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    bench = Bench(folder, int(args.pairs), int(args.items), int(args.users))
    config = folder / "config.yaml"
    half = args.steps // 2
    config.write_text(CONFIG.format(folder=folder, steps=args.steps, memory=args.memory, save_every=max(1, half // 2)))
    try:
        run(bench, config, half, args.steps)
    finally:
        if args.out is not None:
            args.out.write_text(json.dumps([asdict(part) for part in bench.parts], indent=1))


def run(bench: Bench, config: Path, half: int, steps: int) -> None:
    """Run all parts."""
    folder, options = bench.folder, ["--config", str(config)]
    bigdssm = [sys.executable, "-m", "bigdssm.commands"]
    ids = ["--query-id-column", "user_id", "--doc-id-column", "item_id"]
    held_out = f"{HELD_OUT_ROWS / bench.pairs:.12f}"
    fractions = ["--validation-fraction", held_out, "--test-fraction", held_out]
    make = [*bigdssm, "make_shards", "pairs", *options, *ids]

    tables = bench.write_tables("pairs", 0, bench.pairs)
    bench.command("make_shards", [*make, "--pairs", str(tables), *fractions])
    shutil.rmtree(tables)
    bench.parts[-1].facts = {"dataset_mb": disk_mb(folder / "dataset")}
    bench.command("inspect_shards --verify", [*bigdssm, "inspect_shards", str(folder / "dataset"), "--verify"])

    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(free_port())]
    train = ["launch/pretrain.py", *options, "--resume", "auto"]
    started, first_step = time.perf_counter(), dict[str, float]()

    def is_half() -> bool:
        if not first_step and bench.last_step():
            first_step["seconds"] = time.perf_counter() - started
        return bench.last_step() >= half + 50

    bench.command("pretrain, 2 ranks, killed", [*deepspeed, "--num_gpus", "2", *train], kill_when=is_half)
    reached = bench.last_step()
    bench.parts[-1].facts = {"until_first_record": first_step, "rows_per_s": bench.rates(0, reached), "step": reached}
    started, first_step = time.perf_counter(), {}
    bench.command("pretrain, resumed on 1 rank", [*deepspeed, "--num_gpus", "1", *train])
    bench.parts[-1].facts = {"rows_per_s": bench.rates(reached, steps), "step": bench.last_step()}

    more = bench.write_tables("more", bench.pairs, max(1, bench.pairs // 100))
    bench.command("make_shards --append", [*make, "--pairs", str(more), "--append", "more", "--split", "train"])
    model = ["--model", str(folder / "run/pretrain/best"), "--data", str(folder / "dataset")]
    bench.command("embed", [*bigdssm, "embed", *model, "--out", str(folder / "vectors"), "--ranks", "2"])


if __name__ == "__main__":
    main()
