"""Write hard-negative candidates per training query from ratings or a table, without a model.

    bigdssm list_candidates --data DATASET --out GRADED.npy --graded [--low 2]
    bigdssm list_candidates --data DATASET --out SHOWN.npy --given TABLE --query-column user --column shown

The file has the format of bigdssm mine_negatives, for sft.negatives.mining.file.

--graded lists, per query id, the documents with ratings by the same user (query id) in the train split, those with a
relevance of at most --low first. The relevances replace teacher scores in sft.distillation. With
negatives.mining.teacher_margin, documents rated at least as high as the row's positive (minus the margin) are not used
as its negatives.

--given reads the column --column of TABLE (CSV, TSV, JSONL or Parquet), which contains lists of document ids, for
example impressions without a click. --query-column contains ids of users or queries (in a dataset without ids, the text
of single-text queries). With --positive-column, the id of the row's positive, a list applies to that row only. Train
positives of the query are excluded. --position-column contains the positions where the positive and the documents were
shown, for sft.loss.position_bias.
"""

import argparse
import math
from pathlib import Path

from bigdssm.cli import (
    DATA,
    OVERWRITE,
    RULES,
    at_least,
    check_file_to_write,
    command,
    one_of,
    open_with_rules,
    option,
    refuse_options,
)
from bigdssm.errors import ConfigError
from bigdssm.retrieval.mining import write_candidates, write_rated
from bigdssm.retrieval.shards import Share
from bigdssm.utils.log import ProgressBar


@command(
    DATA,
    option("--out", type=Path, required=True, metavar="NPY", help="file for the candidates"),
    RULES,
    one_of(
        option("--graded", action="store_true", help="documents with ratings by the same query id in the train split"),
        option("--given", type=Path, metavar="TABLE", help="documents listed in a table"),
    ),
    option("--low", type=float, default=0.0, help="maximum relevance of explicit negatives (default: %(default)s)"),
    option("--query-column", metavar="NAME", help="column of TABLE with ids of users or queries"),
    option("--positive-column", metavar="NAME", help="column of TABLE with the id of the row's positive"),
    option("--column", metavar="NAME", help="column of TABLE with lists of document ids"),
    option(
        "--position-column", metavar="NAME", help="column of TABLE with lists of positions from 1, the positive's first"
    ),
    option(
        "--width", type=at_least(1), default=50, help="maximum number of documents per query (default: %(default)s)"
    ),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file_to_write("--out", args.out, "list_candidates", overwrite=args.overwrite)
    if args.graded:
        refuse_options(
            args, ["--query-column", "--positive-column", "--column", "--position-column"], "without --given"
        )
    else:
        refuse_options(args, ["--low"], "without --graded")
        if args.query_column is None or args.column is None:
            raise ConfigError("--given needs --query-column and --column, the names of TABLE's columns")
    if args.position_column is not None and args.positive_column is None:
        raise ConfigError("--position-column needs --positive-column, the document that was clicked")
    if not math.isfinite(args.low):
        raise ConfigError(f"--low {args.low}: needs a finite number")
    dataset = open_with_rules(args.data, args.config)
    with ProgressBar() as progress:
        share = Share(progress=progress)
        if args.graded:
            hard = write_rated(args.out, dataset, args.width, args.low, share)
        else:
            columns = args.query_column, args.positive_column, args.column, args.position_column
            hard = write_candidates(args.out, dataset, args.given, columns, args.width, share)
    print(f"{args.out}: {len(hard)} queries, {hard.per_query():.1f} documents per query")


if __name__ == "__main__":
    raise SystemExit(main())
