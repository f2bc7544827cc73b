"""Train sharded tables in every combination of modes, and compare the losses with one rank at ZeRO stage 0.

    python -m tests.distributed.table_matrix [--ranks N …]

The modes are optimizer, precision of towers and rows, clipping, ranks, ZeRO stage, chunks and memory: 1,296 runs.
test_table_training.py runs a pairwise design of them. Exit code 1: a curve differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

from . import small_run
from .conftest import Pools
from .spawn import Pool

OPTIMIZERS = {"rowwise_adagrad": 0.05, "lazy_adam": 0.01}  # learning rates
NUMBERS = {
    "fp32": ((), 1e-5),
    "bf16": (("engine.precision=bf16",), 0.02),
    "bf16 rows": (("model.tables.dtype=bfloat16",), 0.02),
}  # options, relative difference of a step's loss
LIMIT = 0.05  # of the gradient norm, below that of each step
CLIPPING = {"clipped": (f"pretrain.optimizer.gradient_clipping={LIMIT}",), "unclipped": ()}


def run(pool: Pool, config: Path, folder: Path, key: tuple[str, str, str], modes: tuple[str, ...]) -> torch.Tensor:
    """Run eight steps; return their losses and gradient norms, float64 [steps, 2]."""
    optimizer, numbers, clipping = key
    model = (
        "model.tables.sharding=rows", "pretrain.steps=8", "pretrain.validate_every_steps=8", *CLIPPING[clipping],
        f"pretrain.table_optimizer={{name: {optimizer}, lr: {OPTIMIZERS[optimizer]}}}", *NUMBERS[numbers][0],
    )  # fmt: skip
    pool.run(small_run.run, config, folder, (*model, *modes))
    found = [(record["loss"], record["grad_norm"]) for record in small_run.records(folder) if "grad_norm" in record]
    return torch.tensor(found, dtype=torch.float64)


def modes_of(stage: int, chunk_tokens: int, memory: str) -> tuple[str, ...]:
    return f"engine.zero_stage={stage}", f"engine.chunk_tokens={chunk_tokens}", f"engine.table_memory={memory}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    ranks, pools, different = parser.parse_args().ranks, Pools(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = small_run.write_dataset(folder)
        for key in itertools.product(OPTIMIZERS, NUMBERS, CLIPPING):
            one = run(pools[1], config, folder / "-".join(key), key, ("engine.zero_stage=0",))
            rest = itertools.product(ranks, range(4), (0, 400, 60), ("device", "host", "file"))
            for number, (world_size, *mode) in enumerate(rest):
                found = run(pools[world_size], config, folder / f"{'-'.join(key)}-{number}", key, modes_of(*mode))
                error = float(((found - one) / one)[:, 0].abs().max())
                equal = error <= NUMBERS[key[1]][1]
                different += not equal
                print(*key, world_size, "ranks", *mode, f"{error:.1e}", "equal" if equal else "DIFFERS", flush=True)
    pools.close()
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
