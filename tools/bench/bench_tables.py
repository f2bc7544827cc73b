"""Measure a step of tables sharded by rows: against a dense table, by size, and with a billion rows in files.

    python tools/bench/bench_tables.py dense --rows 1000000     # DeepSpeed ZeRO 1 with nn.Embedding, and sharded
    python tools/bench/bench_tables.py sizes                    # the same batch, tables of 1M and 8M rows
    python tools/bench/bench_tables.py checkpoints --steps 10     # bytes of table rows in successive checkpoints
    python tools/bench/bench_tables.py files --rows 1000000000 --folder /tmp/tables [--uniform]

A step fetches the rows of a batch, looks them up, returns the gradients of a linear loss, and updates. Ids are drawn
by Zipf's law (exponent 1.05) or uniformly, `--ids` of them per rank; two CPU ranks with gloo and one thread each. Times
are medians over the steps after the first two; bytes are those that a rank sends. `checkpoints` saves every `--steps`,
after ten times as many the first time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import read_manifest
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cli import at_least
from bigdssm.tables.files import table_tensors
from bigdssm.tables.optimizers import RowwiseAdagrad
from bigdssm.tables.rows import TableSpec
from bigdssm.tables.sharded import ShardedTables

CHECKPOINTS, FIRST_INTERVALS = 6, 10
WARM_UP = 2
ZIPF = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("task", choices=sorted(TASKS), help="measurement")
    parser.add_argument("--rows", type=at_least(1), default=1_000_000, help=f"rows of the table {default}")
    parser.add_argument("--dim", type=at_least(1), default=64, help=f"width {default}")
    parser.add_argument("--ids", type=at_least(1), default=16_384, help=f"ids per rank and step {default}")
    parser.add_argument("--steps", type=at_least(3), default=12, help=f"steps {default}")
    parser.add_argument("--ranks", type=at_least(1), default=2, help=f"number of ranks {default}")
    parser.add_argument("--uniform", action="store_true", help="ids are uniform instead of Zipf's")
    parser.add_argument("--folder", type=Path, help="folder of the files of `files` and `checkpoints`")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (args, f"file://{folder}/rendezvous"), nprocs=args.ranks)


def _rank(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks))
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.ranks)
    for line in TASKS[args.task](args, np.random.RandomState(rank)):
        if rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()


def ids_of(args: argparse.Namespace, random: np.random.RandomState, rows: int) -> np.ndarray:
    """Return `args.ids` ids from 1 on: the inverse of the continuous distribution is exact enough for a benchmark."""
    uniform = random.rand(args.ids)
    if args.uniform:
        return 1 + (uniform * (rows - 1)).astype(np.int64)
    power = 1 - ZIPF
    return np.clip((1 + uniform * ((rows - 1) ** power - 1)) ** (1 / power), 1, rows - 1).astype(np.int64)


def sharded_steps(
    args: argparse.Namespace, random: np.random.RandomState, rows: int, folder: Path | None = None
) -> tuple[str, float]:
    """Return a line and the median seconds of a step."""
    started = time.perf_counter()
    tables = ShardedTables([TableSpec("table", rows, args.dim)], RowwiseAdagrad(lr=0.05), 0, folder=folder)
    opened = time.perf_counter() - started
    seconds, distinct, sent = [], [], []
    for _ in range(args.steps):
        ids = ids_of(args, random, rows)
        dist.barrier()
        started, before = time.perf_counter(), tables.sent_bytes
        found, positions = np.unique(ids, return_inverse=True)
        working = tables.fetch({"table": found})
        working.look_up("table", torch.from_numpy(positions + 1)).sum().backward()
        tables.reduce(working)
        tables.commit(1.0, 1.0)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        distinct.append(len(found))
        sent.append(tables.sent_bytes - before)
    load = np.bincount(tables.partition.owner(found), minlength=args.ranks)
    median = statistics.median(seconds[WARM_UP:])
    return (
        f"sharded, {rows:,} rows x {args.dim}: opened in {opened:.2f} s; {1000 * median:.0f} ms a step, "
        f"{statistics.mean(sent) / 1e6:.2f} MB sent, {statistics.mean(distinct):,.0f} distinct ids of {args.ids:,}, "
        f"{tables.num_exchanges / args.steps:.0f} all-to-alls, owners max/mean {load.max() / load.mean():.2f}, "
        f"{status_mb('RssAnon'):,.0f} MB of anonymous memory"
    ), median


def dense(args: argparse.Namespace, random: np.random.RandomState) -> Iterator[str]:
    """Yield a step of nn.Embedding under DeepSpeed ZeRO 1, and a step of the sharded table."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    module = nn.Embedding(args.rows, args.dim)
    config = {
        "train_micro_batch_size_per_gpu": args.ids, "zero_optimization": {"stage": 1}, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.Adagrad(module.parameters()), config=config)
    seconds = []
    for _ in range(args.steps):
        ids = torch.from_numpy(ids_of(args, random, args.rows))
        dist.barrier()
        started = time.perf_counter()
        engine.backward(engine(ids).sum())
        engine.step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    size = args.rows * args.dim * 4 * (args.ranks - 1) / args.ranks
    plain = statistics.median(seconds[WARM_UP:])
    yield (
        f"dense, {args.rows:,} rows x {args.dim}, ZeRO 1: {1000 * plain:.0f} ms a step, {3 * size / 1e6:.0f} MB sent "
        "(gradients all-reduced, weights gathered), by ring collectives"
    )
    del engine, module
    line, median = sharded_steps(args, random, args.rows)
    yield f"{line}; {plain / median:.0f} times as fast"


def sizes(args: argparse.Namespace, random: np.random.RandomState) -> Iterator[str]:
    """Yield steps of the given number of rows, and of eight times as many."""
    medians = []
    for rows in (args.rows, 8 * args.rows):
        line, median = sharded_steps(args, np.random.RandomState(random.randint(2**31)), rows)
        medians.append(median)
        yield line
    yield f"time of eight times the rows: {medians[1] / medians[0]:.2f}"


def files(args: argparse.Namespace, random: np.random.RandomState) -> Iterator[str]:
    """Yield steps of a table in files."""
    if args.folder is None:
        raise SystemExit("files: needs --folder")
    yield sharded_steps(args, random, args.rows, args.folder)[0]


def checkpoints(args: argparse.Namespace, random: np.random.RandomState) -> Iterator[str]:
    """Yield the bytes of table rows that successive checkpoints write, and those of all rows."""
    tables = ShardedTables([TableSpec("table", args.rows, args.dim)], RowwiseAdagrad(lr=0.05), 0)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(distributed.broadcast_object(name))
        store = CheckpointStore(folder, keep=2)
        for number in range(1, CHECKPOINTS + 1):
            saved = tables.steps
            intervals = FIRST_INTERVALS if number == 1 else 1
            for _ in range(intervals * args.steps):
                found, positions = np.unique(ids_of(args, random, args.rows), return_inverse=True)
                working = tables.fetch({"table": found})
                working.look_up("table", torch.from_numpy(positions + 1)).sum().backward()
                tables.reduce(working)
                tables.commit(1.0, 1.0)
            updated = tables.stores["table"].updated
            of_rank = [(updated > 0).sum(), (updated > saved).sum(), nbytes(table_tensors(tables))]
            trained, changed, whole = distributed.all_reduce(torch.tensor(of_rank, dtype=torch.int64)).tolist()
            started = time.perf_counter()
            path = store.save(tables.steps, {}, {}, {}, [], tables)
            seconds = time.perf_counter() - started
            shares = [read_manifest(path).table_shares(rank) for rank in range(args.ranks)]
            yield (
                f"checkpoint {number}, {args.rows:,} rows x {args.dim}, {intervals * args.steps} steps: {changed:,} of "
                f"{trained:,} trained rows changed; {sum(files[-1].size for files in shares) / 1e6:,.1f} MB of table "
                f"rows written in {seconds:.2f} s, all rows {whole / 1e6:,.1f} MB; {len(shares[0])} row files"
            )
        dist.barrier()


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def status_mb(field: str) -> float:
    """Return a field of this process's memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


TASKS: dict[str, Callable[[argparse.Namespace, np.random.RandomState], Iterator[str]]] = {
    "checkpoints": checkpoints, "dense": dense, "sizes": sizes, "files": files,
}  # fmt: skip

if __name__ == "__main__":
    main()
