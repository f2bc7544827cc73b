"""Measure the cost of a checkpoint per rank: seconds that training waits, bytes written and read, memory.

    python tools/bench/bench_checkpoint.py --ranks 2 --weights 50000000 --out checkpoint.json

An embedding table of `--weights` numbers with AdamW, at a ZeRO stage. The checkpoint is written twice, synchronously
and in the background, and read back. Seconds and megabytes are the maximum over ranks; the page cache is used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cli import at_least, run_main
from bigdssm.config import EngineConfig
from bigdssm.distributed import free_port
from bigdssm.training.optimizers import AdamW

WIDTH = 64


class Table(nn.Module):
    """A single embedding table."""

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(weights // WIDTH, WIDTH)

    def forward(self, query: Tensor, doc: None) -> Tensor:
        vectors: Tensor = self.rows(query)
        return vectors


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=at_least(1), default=2, help="number of ranks (default: %(default)s)")
    parser.add_argument(
        "--weights", type=at_least(64), default=50_000_000, help="number of weights (default: %(default)s)"
    )
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1, help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--folder", help="parent folder of the checkpoints (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, metavar="JSON", required=True, help="file for the results")
    args = parser.parse_args()
    return run_main(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    """Start the ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(args.ranks)}
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as folder:
        mp.spawn(_rank, (args, Path(folder)), nprocs=args.ranks)


def _rank(rank: int, args: argparse.Namespace, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    from bigdssm.training.engine import Engine
    from bigdssm.training.process_group import init_process_group

    init_process_group()
    engine = Engine(Table(args.weights), EngineConfig(zero_stage=args.zero_stage), AdamW(), 1)
    vectors: Any = engine.forward(query=torch.arange(64))  # type: ignore[arg-type]
    engine.backward([(vectors, torch.ones_like(vectors))])
    engine.step(1.0)
    del vectors
    store = CheckpointStore(folder, keep=1)
    distributed.background_group()
    found: dict[str, float] = {}
    for step, in_background in enumerate((False, True), start=1):
        name = "in the background" if in_background else "waited for"
        before = _begin()
        started = time.perf_counter()
        store.save(step, {}, {}, {"cpu": torch.get_rng_state()}, engine.local_pieces(), in_background=in_background)
        found[f"{name}: training waits, s"] = time.perf_counter() - started
        store.wait()
        found[f"{name}: on the disk after, s"] = time.perf_counter() - started
        found[f"{name}: memory, MB"] = (_status("VmHWM") - before) / 1e6
    file = folder / f"step-{2:08d}" / f"tensors-{rank:05d}.safetensors"
    found["written, MB"] = file.stat().st_size / 1e6
    before = _begin()
    started = time.perf_counter()
    newest = store.newest_valid()
    assert newest is not None
    found["read and verified after, s"] = time.perf_counter() - started
    found["read, MB"] = sum(len(block.content) for block in newest.blocks) / 1e6
    engine.restore(newest.reader(), applied_steps=1)
    found["restored after, s"] = time.perf_counter() - started
    found["restored: memory, MB"] = (_status("VmHWM") - before) / 1e6
    of_ranks = distributed.all_gather_object(found)
    if rank == 0:
        maxima = {name: round(max(values[name] for values in of_ranks), 3) for name in found}
        args.out.write_text(json.dumps({**vars(args), "out": str(args.out), **maxima}, indent=2) + "\n")
        print(json.dumps(maxima, indent=2))


def _begin() -> int:
    """Reset the peak memory, synchronize the ranks, and return the current memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    distributed.barrier()
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    sys.exit(main())
