"""Say what a stage will take before it runs: memory, negatives, communication, checkpoints, days.

    bigdssm estimate --config configs/debian_packages.yaml
    bigdssm estimate --config F --gpus 64 --rows 65536 --rows-per-s 40000 [key=value …]

The dataset must be there: its vocabularies, and the rows of one step, are what the memory depends on. Without
--rows-per-s the days are those at the speed that the run in run.dir has recorded, if there is one. Left out of the
memory is what a process takes that has imported everything and trains nothing, some 0.5 GB.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from bigdssm.cli import command
from bigdssm.config import load_config
from bigdssm.dataset.joined import open_dataset
from bigdssm.errors import ConfigError
from bigdssm.training.estimate import estimate, recorded_rows_per_s


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("--stage", choices=["pretrain", "sft"], default="pretrain", help="(%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, with or without GPUs (default: 1)")
    parser.add_argument("--rows", type=int, metavar="R", help="rows of a step on all ranks, in place of the config's")
    parser.add_argument("--rows-per-s", type=float, metavar="X", help="speed of all ranks together, for the days")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted config keys")
    args = parser.parse_intermixed_args(argv)
    for name, given in (("--gpus", args.gpus), ("--rows", args.rows)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} {given}: needs at least 1")
    if args.rows_per_s is not None and not 0 < args.rows_per_s < math.inf:
        raise ConfigError(f"--rows-per-s {args.rows_per_s}: needs a finite number above 0")
    rows = [f"{args.stage}.rows_global={args.rows}"] if args.rows else []
    config = load_config(args.config, [*args.overrides, *rows])
    dataset = open_dataset(config.data)
    dataset.check_against(config.data)
    found = estimate(config, args.stage, dataset, args.gpus)
    speed = args.rows_per_s or recorded_rows_per_s(config.stage_dir(args.stage))
    for line in found.lines(speed):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
