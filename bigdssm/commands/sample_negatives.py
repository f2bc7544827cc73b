"""Print a sample of hard negatives with query and positive, to estimate the rate of false negatives.

    bigdssm sample_negatives --mined RUN/sft/mined_negatives.npy --data DATASET [--count 50]

The queries are evenly spaced over the file, with one negative per query, sampled as in training, but without
negatives.mining.teacher_margin. Texts are printed after truncation by the tokenizer, as the towers receive them.
"""

import argparse
from pathlib import Path

from bigdssm.cli import DATA, RULES, command, open_with_rules, option
from bigdssm.errors import ConfigError
from bigdssm.retrieval.hard_negatives import HardNegatives, sample_negatives


@command(
    option(
        "--mined",
        type=Path,
        required=True,
        metavar="NPY",
        help="file of hard negatives, written by fine-tuning or by bigdssm mine_negatives",
    ),
    DATA,
    RULES,
    option("--count", type=int, default=50, help="number of negatives (default: %(default)s)"),
    option("--seed", type=int, default=0, help="seed of the sampling, in training run.seed (default: %(default)s)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if args.count < 1:
        raise ConfigError(f"--count {args.count}: needs at least 1")
    negatives = HardNegatives.open(args.mined)
    dataset = open_with_rules(args.data, args.config)
    negatives.check_against(dataset)
    for number, sample in enumerate(sample_negatives(dataset, negatives, args.count, args.seed), start=1):
        print(f"{number}. row {sample.row_id}: {sample.query}")
        print(f"   document: {sample.document}\n   negative: {sample.negative}")


if __name__ == "__main__":
    raise SystemExit(main())
