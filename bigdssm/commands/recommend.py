"""Batch inference: write the top documents of all users, a split or a table of queries as Parquet.

    bigdssm recommend --model MODEL --index INDEX --users --out OUT [--top 10] [--filter "year >= 1990"]
    bigdssm recommend --model MODEL --index INDEX --split test --out OUT
    bigdssm recommend --model MODEL --index INDEX --queries new_users.parquet --key-column user --out OUT
    torchrun --nproc-per-node 8 -m bigdssm.commands.recommend --model MODEL --index INDEX --users --out OUT

OUT/part-*.parquet contain one row per query and document: row, query, rank, document, score. A table of queries has the
columns of the query features, as for make_shards; --events-column is a list of document keys (history), oldest first.
--exclude-column is a list of the keys of documents that are no answers to the query of the row; --exclude-table has a
row per user and such a document. Seen documents are excluded unless the model's data.exclude_seen is false; --seen
overrides it for one job.

If OUT ends in .csv, the result is one CSV file with the same columns; OUT.parts/ is temporary.

An interrupted job continues from its finished shards when restarted, with any number of ranks.
"""

import argparse
from pathlib import Path

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import OVERWRITE, SEARCH_OPTIONS, check_file_to_write, command, one_of, option, refuse_options
from bigdssm.commands._ranks import DEVICE, RANKS, run_on_ranks
from bigdssm.commands.search import HELPS, SEEN, SEEN_HELP, feature_values
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import ConfigError
from bigdssm.retrieval.index import open_index
from bigdssm.retrieval.recommend import (
    Exclusions,
    QuerySource,
    RecommendOptions,
    SplitRows,
    TableRows,
    Users,
    recommend,
    write_csv,
)
from bigdssm.retrieval.shards import ROWS_PER_SHARD, Share
from bigdssm.stores.base import is_store
from bigdssm.utils.device import find_device
from bigdssm.utils.log import ProgressBar


@command(
    *SEARCH_OPTIONS,
    option("--out", type=Path, required=True, help="folder for the Parquet files, or a file that ends in .csv"),
    one_of(
        option("--users", action="store_true", help="all users of the dataset, with all their events"),
        option("--split", help="rows of a split, as in evaluation"),
        option("--queries", type=Path, metavar="TABLE", help="table of queries: CSV, TSV, JSONL or Parquet"),
    ),
    option("--key-column", metavar="NAME", help="column of TABLE with query keys"),
    option("--events-column", metavar="NAME", help="column of TABLE with the document keys of the history"),
    option("--exclude-column", metavar="NAME", help="column of TABLE with the keys of documents that are no answers"),
    option(
        "--exclude-table",
        type=Path,
        metavar="TABLE",
        help="table of documents that are no answers, with a row per user and document",
    ),
    option("--user-column", default="user_id", metavar="NAME", help="column of --exclude-table (default: %(default)s)"),
    option("--item-column", default="item_id", metavar="NAME", help="column of --exclude-table (default: %(default)s)"),
    option("--now", type=float, help="time of the requests; later events of users are ignored"),
    option(
        "--context",
        nargs="+",
        action="extend",
        default=[],
        metavar="FEATURE=VALUE",
        help="features of all requests (data.request), such as action=purchase",
    ),
    option("--top", type=int, default=10, help="documents per query (default: %(default)s)"),
    option("--filter", metavar="CONDITIONS", help=HELPS["filter"]),
    option("--seen", choices=SEEN, help=SEEN_HELP),
    option("--rows-per-shard", type=int, default=ROWS_PER_SHARD, help="queries per shard (default: %(default)s)"),
    DEVICE,
    RANKS,
    OVERWRITE,
)
def main(args: argparse.Namespace) -> int | None:
    """Run the command line."""
    if is_store(args.index):
        raise ConfigError("--index: recommend needs an index folder, not a store; build one with bigdssm build_index")
    as_csv = args.out.suffix == ".csv"
    if as_csv:
        check_file_to_write("--out", args.out, "recommend", overwrite=args.overwrite)
    context = feature_values("--context", args.context)
    if args.split is not None:
        refuse_options(args, ["--now", "--context"], "with --split, whose rows have them")
    if args.queries is None:
        refuse_options(args, ["--key-column", "--events-column", "--exclude-column"], "without --queries")
    if args.exclude_table is None:
        refuse_options(args, ["--user-column", "--item-column"], "without --exclude-table")
    options = RecommendOptions(args.top, args.filter, None if args.seen is None else SEEN[args.seen])
    if (code := run_on_ranks("recommend", args)) is not None:
        return code
    with ProgressBar() as progress:
        work = Share.from_launcher(args.rows_per_shard, progress)
        folder, index = load_model_folder(args.model, find_device(args.device)), open_index(args.index)
        dataset = Dataset.open(args.data or folder.config.data.dir, cache=FileCache.from_config(folder.config.data))
        dataset = dataset.with_rules(EventRules.of(folder.config.data))
        parts = args.out.with_name(f"{args.out.name}.parts") if as_csv else args.out
        queries: QuerySource
        if args.users:
            queries = Users(folder.view(dataset), args.now, context)
        elif args.split is not None:
            queries = SplitRows(dataset, args.split)
        else:
            columns = args.key_column, args.events_column
            queries = TableRows(dataset, args.queries, *columns, args.now, context, args.exclude_column)
        exclusions = None
        if args.exclude_table is not None:
            exclusions = Exclusions(dataset, args.exclude_table, args.user_column, args.item_column)
        overwrite = args.overwrite and not as_csv
        done = recommend(
            parts, folder, index, dataset, queries, options, work, exclusions=exclusions, overwrite=overwrite
        )
        if as_csv and done.finished:
            write_csv(parts, args.out)
    resumed = f", {done.resumed_shards} shards were already finished" if done.resumed_shards else ""
    rate = f"{done.queries} queries in {done.seconds:.1f} s, {done.queries / max(done.seconds, 1e-9):.0f} per second"
    print(f"rank {work.rank} of {work.world_size}: {rate}{resumed}")
    if done.finished:
        print(f"{args.out}: done")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
