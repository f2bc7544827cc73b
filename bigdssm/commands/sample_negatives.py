"""Print some mined negatives beside their query and its document, to judge how many are none.

    bigdssm sample_negatives --mined RUN/sft/mined_negatives.npy --data DATASET [--count 50]

The rows are evenly spaced over those mined for, one negative each, drawn as training draws them. Texts are shown as the
towers read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import command
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.retrieval.hard_negatives import HardNegatives, sample_negatives


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mined", type=Path, required=True, metavar="NPY", help="of fine-tuning or mine_negatives.py")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--count", type=int, default=50, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the run's (%(default)s)")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise ConfigError(f"--count {args.count}: needs at least 1")
    mined, dataset = HardNegatives.open(args.mined), Dataset.open(args.data)
    mined.check_against(dataset)
    for number, one in enumerate(sample_negatives(dataset, mined, args.count, args.seed), start=1):
        print(f"{number}. row {one.row_id}: {one.query}\n   document: {one.document}\n   negative: {one.negative}")


if __name__ == "__main__":
    sys.exit(main())
