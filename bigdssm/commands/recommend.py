"""Write the best documents of all users, of a split or of a table of queries as Parquet.

    bigdssm recommend --model MODEL --index INDEX --users --out OUT [--top 10] [--filter "year >= 1990"]
    bigdssm recommend --model MODEL --index INDEX --split test --out OUT
    bigdssm recommend --model MODEL --index INDEX --queries new_users.parquet --key-column user --out OUT
    torchrun --nproc-per-node 8 -m bigdssm.commands.recommend --model MODEL --index INDEX --users --out OUT

OUT/part-*.parquet have a row for each document of each query: row, query, rank, document, score. A table has the
columns that make_shards reads the query's features from; --events-column lists the keys of the documents of a history,
oldest first. What was seen is left out unless the model's data.exclude_seen is false; --seen sets it for one job.

Where OUT ends in .csv it is one file of the same columns, made of OUT.parts/, which is removed then.

A job that was ended goes on from its finished shards when it is started again, with any number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import ProgressBar, add_search_options, check_file_to_write, command, refuse_options
from bigdssm.commands.search import SEEN
from bigdssm.dataset.cache import FileCache
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.index import open_index
from bigdssm.retrieval.recommend import QuerySource, RecommendOptions, SplitRows, TableRows, Users, recommend, write_csv
from bigdssm.retrieval.shards import ROWS_PER_SHARD, ShardWork


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_search_options(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the Parquet files, or a file that ends in .csv"
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--users", action="store_true", help="all users of the dataset, with all their events")
    asked.add_argument("--split", help="the rows of a split, as they are evaluated")
    asked.add_argument("--queries", type=Path, metavar="TABLE", help="CSV, TSV, JSONL or Parquet")
    parser.add_argument("--key-column", metavar="NAME", help="of TABLE: what names a query")
    parser.add_argument("--events-column", metavar="NAME", help="of TABLE: keys of the documents of the history")
    parser.add_argument("--top", type=int, default=10, help="documents of a query (%(default)s)")
    parser.add_argument("--filter", metavar="CONDITIONS", help="which documents may be found")
    parser.add_argument("--seen", choices=SEEN, help="whether seen documents may be found")
    parser.add_argument("--rows-per-shard", type=int, default=ROWS_PER_SHARD, help="queries a shard (%(default)s)")
    args = parser.parse_args(argv)
    if args.out.suffix == ".csv":
        check_file_to_write("--out", args.out)
    if args.queries is None:
        refuse_options(parser, args, ["--key-column", "--events-column"], "without --queries")
    wanted = RecommendOptions(args.top, args.filter, None if args.seen is None else SEEN[args.seen])
    with ProgressBar() as progress:
        work = ShardWork.of_launcher(args.rows_per_shard, progress)
        folder, index = load_model_folder(args.model), open_index(args.index)
        dataset = Dataset.open(args.data or folder.config.data.dir, cache=FileCache.of(folder.config.data))
        as_csv = args.out.suffix == ".csv"
        parts = args.out.with_name(f"{args.out.name}.parts") if as_csv else args.out
        done = recommend(parts, folder, index, dataset, _source(args, dataset), wanted, work)
        if as_csv and done.finished:
            write_csv(parts, args.out)
    went_on = f", {done.found} shards were finished before" if done.found else ""
    rate = f"{done.queries} queries in {done.seconds:.1f} s, {done.queries / max(done.seconds, 1e-9):.0f} a second"
    print(f"rank {work.rank} of {work.world_size}: {rate}{went_on}")
    if done.finished:
        print(f"{args.out}: done")


def _source(args: argparse.Namespace, dataset: Dataset) -> QuerySource:
    if args.users:
        return Users(dataset)
    if args.split is not None:
        return SplitRows(dataset, args.split)
    return TableRows(dataset, args.queries, args.key_column, args.events_column)


if __name__ == "__main__":
    sys.exit(main())
