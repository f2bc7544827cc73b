"""List documents known for each train query: what it rated, or what a table says it was shown.

    bigdssm list_candidates --data DATASET --out GRADED.npy --graded [--low 2]
    bigdssm list_candidates --data DATASET --out SHOWN.npy --given TABLE --query-column user --column shown

The file has the format of bigdssm mine_negatives, for sft.negatives.mining.file; no model is needed.

--graded lists what each query id has rated in the train split, documents of a relevance of at most --low first. The
relevances take the place of a teacher's scores, for sft.distillation; with negatives.mining.teacher_margin a document
rated as high as the row's own is not its negative.

--given lists what TABLE (CSV, TSV, JSONL or Parquet) has in --column, a list of document ids: impressions without a
click, say. --query-column holds the ids of users or queries (where the dataset was made without, the text of a query
that is nothing else); with --own-column, the id of the row's own document, a list is of that row alone. Train positives
of the query are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import ProgressBar, at_least, check_file_to_write, command, refuse_options
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.retrieval.candidates import write_candidates, write_rated
from bigdssm.retrieval.embed import Share


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--out", type=Path, required=True, metavar="NPY", help="file for the windows")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--graded", action="store_true", help="what the query has rated in the train split")
    kind.add_argument("--given", type=Path, metavar="TABLE", help="what a table lists")
    parser.add_argument("--low", type=float, default=0.0, help="relevance of explicit negatives, at most (%(default)s)")
    parser.add_argument("--query-column", metavar="NAME", help="of TABLE: ids of users or queries")
    parser.add_argument("--own-column", metavar="NAME", help="of TABLE: ids of the rows' own documents")
    parser.add_argument("--column", metavar="NAME", help="of TABLE: lists of document ids")
    parser.add_argument("--width", type=at_least(1), default=50, help="most documents of a query (%(default)s)")
    args = parser.parse_args(argv)
    check_file_to_write("--out", args.out)
    if args.graded:
        refuse_options(parser, args, ["--query-column", "--own-column", "--column"], "without --given")
    else:
        refuse_options(parser, args, ["--low"], "without --graded")
        if args.query_column is None or args.column is None:
            raise ConfigError("--given needs --query-column and --column, which say what TABLE's columns are")
    if not math.isfinite(args.low):
        raise ConfigError(f"--low {args.low}: needs a finite number")
    dataset = Dataset.open(args.data)
    with ProgressBar() as progress:
        share = Share(progress=progress)
        if args.graded:
            mined = write_rated(args.out, dataset, args.width, args.low, share)
        else:
            columns = args.query_column, args.own_column, args.column
            mined = write_candidates(args.out, dataset, args.given, columns, args.width, share)
    print(f"{args.out}: {len(mined)} queries, {mined.per_query():.1f} documents each")


if __name__ == "__main__":
    sys.exit(main())
