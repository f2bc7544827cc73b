"""Train each family of text encoders in every combination of modes, and compare the loss with one rank at ZeRO stage 0.

    python -m tests.distributed.encoder_matrix [--family NAME …] [--ranks N …]

The modes are ranks, ZeRO stage, chunks, LoRA, precision and recomputed activations: 192 runs per family.
test_text_encoders.py runs a pairwise design of them. Exit code 1: a curve differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

from bigdssm.cluster.metrics import read_stage
from tests.encoders import FAMILIES, LORA, write_pairs

from . import small_run
from .conftest import Pools

LIMITS = {"fp32": 1e-5, "bf16": 0.02}  # relative difference of a step's loss
CHUNKS, AGAIN, BF16 = "engine.chunk_tokens=60", "engine.checkpoint_activations=true", "engine.precision=bf16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES), help="default: all")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    args = parser.parse_args()
    pools, different = Pools(), 0
    for family in args.family:
        with tempfile.TemporaryDirectory() as folder:
            different += compare(family, Path(folder), args.ranks, pools)
    pools.close()
    return 1 if different else 0


def compare(family: str, folder: Path, ranks: list[int], pools: Pools) -> int:
    """Print one line per combination; return the number of those that differ from their reference."""
    config, different = write_pairs(folder, family), 0
    for lora, precision in itertools.product(((), LORA), LIMITS):
        model = (*lora, *([BF16] if precision == "bf16" else []))
        reference = folder / f"one-{len(model)}"
        pools[1].run(small_run.run, config, reference, ("engine.zero_stage=0", *model))
        expected = losses(reference)
        for number, stage, chunks, again in itertools.product(ranks, range(4), ((), (CHUNKS,)), ((), (AGAIN,))):
            modes = (f"engine.zero_stage={stage}", *chunks, *again)
            run = folder / f"{len(model)}-{number}-{'-'.join(modes)}"
            pools[number].run(small_run.run, config, run, (*modes, *model), timeout_s=300)
            error = float(((losses(run) - expected) / expected).abs().max())
            verdict = "equal" if error <= LIMITS[precision] else "DIFFERS"
            different += verdict != "equal"
            print(family, f"{number} ranks", *modes, *model, f"{error:.1e}", verdict, flush=True)
    return different


def losses(run_dir: Path) -> torch.Tensor:
    records = read_stage(run_dir / "pretrain")
    return torch.tensor([record["loss"] for record in records if "loss" in record])


if __name__ == "__main__":
    sys.exit(main())
