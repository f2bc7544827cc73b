"""Build a dataset from tables: shards, catalogue, tokenizer and schema.

    bigdssm make_shards interactions --config F [key=value …] --interactions F --items F [--users F]
    bigdssm make_shards items --config F [key=value …] --append NAME [--items F] [--withdrawn F]
    bigdssm make_shards pairs --config F [key=value …] --pairs F [F …] [--group-column C]
    bigdssm make_shards webdataset --config F [key=value …] --shards F [F …]

`--help` after a sub-command lists its options. The config's `data` section defines the schema. The dataset appears
atomically at the end. After a kill, run the same command with the same files to continue.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from bigdssm.cli import command_parser, refuse_options, run_main
from bigdssm.errors import ConfigError
from bigdssm.ingest.api import EngineName, make_dataset
from bigdssm.sources.opening import SPARK_PREFIX
from bigdssm.utils.log import ProgressBar
from bigdssm.utils.urls import is_url

SPLIT_OPTIONS = ("split", "validation_fraction", "test_fraction", "validation_from", "test_from", "until")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    files = getattr(args, "pairs", [])
    args.overrides = [word for word in [*rest, *map(str, files)] if _is_override(word)]
    if unknown := [word for word in rest if not _is_override(word)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if files:
        args.pairs = [path for path in files if not _is_override(str(path))]

    def run() -> None:
        if args.append is not None:
            why = "with --append, which names the partition"
            refuse_options(args.common, args, ["--overwrite", "--partition"], why)
        args.run(args)

    return run_main(run)


def _table(word: str) -> Path | str:
    """Return a URL or query unchanged, another word as a path."""
    return word if is_url(word) or word.startswith(SPARK_PREFIX) else Path(word)


def _is_override(word: str) -> bool:
    """Return True for key=value, which may be anywhere, including after a list of files."""
    return "=" in word and not word.startswith(("-", SPARK_PREFIX)) and not is_url(word) and not Path(word).exists()


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(title="sub-commands", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.set_defaults(common=common)
    common.add_argument("--config", type=Path, required=True, help="YAML file; key=value arguments override its keys")
    common.add_argument(
        "--out", type=_table, help="dataset folder, or a URL such as s3://… (default: data.dir of the config)"
    )
    common.add_argument(
        "--seed", type=int, default=0, help="seed of the shuffle and of random splits (default: %(default)s)"
    )
    common.add_argument(
        "--partition", default="base", help="name of the first partition of a new dataset (default: %(default)s)"
    )
    common.add_argument("--overwrite", action="store_true", help="replace a dataset at --out, and any folder at --beir")
    common.add_argument("--like", type=Path, metavar="DIR", help="reuse the schema and tokenizer of this dataset")
    common.add_argument("--append", metavar="NAME", help="add a partition of this name to the dataset at --out")
    common.add_argument(
        "--engine", choices=get_args(EngineName), default="built-in", help="ingestion engine (default: %(default)s)"
    )
    common.add_argument(
        "--processes", type=int, default=0, help="processes of the built-in engine (default: one per core)"
    )
    common.add_argument("--master", metavar="URL", help="Spark master, with --engine spark: yarn, local[4] …")
    common.add_argument(
        "--spark-conf", metavar="K=V", action="append", default=[], help="Spark setting; repeatable (default: none)"
    )

    name = "interactions"
    sub = commands.add_parser(name, parents=[common], help="rows (history → next item) from tables of events")
    sub.set_defaults(run=_interactions)
    sub.add_argument(
        "--interactions", type=_table, required=True,
        help="table of events: .tsv .csv .jsonl .parquet; optionally compressed (.gz .xz .zst)",
    )  # fmt: skip
    sub.add_argument(
        "--items",
        type=_table,
        required=True,
        help="table of items, the catalogue; one row per item, or several with --items-time-column",
    )
    sub.add_argument(
        "--users",
        type=_table,
        help="table of users, for query features other than histories; one row per user, or several with "
        "--users-time-column",
    )
    sub.add_argument("--user-column", default="user_id", help="column of user ids (default: %(default)s)")
    sub.add_argument("--item-column", default="item_id", help="column of item ids (default: %(default)s)")
    sub.add_argument(
        "--time-column", default="timestamp",
        help="column of event times, '' if the events are in time order (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--items-time-column",
        help="column of items with the time from which a row is valid: an event uses the latest row that is not newer",
    )
    sub.add_argument(
        "--users-time-column",
        help="column of users with the time from which a row is valid: a dataset row uses the latest one that is not "
        "newer than its first target",
    )
    sub.add_argument("--rating-column", help="column of relevances (default: every relevance is 1)")
    sub.add_argument("--min-rating", type=float, help="drop events with a lower rating (default: keep all)")
    sub.add_argument(
        "--positive-rating", type=float, metavar="R",
        help="events with at least this rating have relevance 1, others 0: these are in histories, but are not learned "
        "or evaluated as targets",
    )  # fmt: skip
    sub.add_argument("--split", choices=("leave-one-out", "time", "train"), help=_split_help("leave-one-out"))
    _add_split_sizes(sub, "--split time")

    sub = commands.add_parser("items", parents=[common], help="add items to a dataset without events, or withdraw some")
    sub.set_defaults(run=_items)
    sub.add_argument("--items", type=_table, help="table of new or changed items, or of withdrawn ones that are back")
    sub.add_argument("--withdrawn", type=_table, help="table with the ids of items that are no longer offered")
    sub.add_argument("--item-column", default="item_id", help="column of item ids (default: %(default)s)")
    sub.add_argument("--items-time-column", help="column of items with the time from which a row is valid")

    sub = commands.add_parser("pairs", parents=[common], help="rows with query and document features")
    sub.add_argument(
        "--pairs", type=_table, nargs="+", required=True,
        help="tables, or folders of them: .tsv .csv .jsonl .parquet; optionally compressed (.gz .xz .zst)",
    )  # fmt: skip
    _add_pair_options(sub)

    sub = commands.add_parser(
        "webdataset",
        parents=[common],
        help="pairs from WebDataset shards; columns from the .json of a sample, or from its .query.txt and .doc.txt",
    )
    sub.add_argument(
        "--shards", dest="pairs", type=_table, nargs="+", required=True,
        help="WebDataset shards: .tar; optionally compressed, such as .tar.gz",
    )  # fmt: skip
    _add_pair_options(sub)

    return parser


def _add_pair_options(sub: argparse.ArgumentParser) -> None:
    sub.set_defaults(run=_pairs)
    sub.add_argument("--doc-id-column", help="column of document ids (default: hash of all document features)")
    sub.add_argument("--query-id-column", help="column of query ids (default: hash of all query features)")
    sub.add_argument("--relevance-column", help="column of relevances (default: every relevance is 1)")
    sub.add_argument("--split", choices=("random", "time", "column", "train"), help=_split_help("random"))
    sub.add_argument(
        "--group-column", help="--split random: rows with an equal value share a split (default: rows of one query)"
    )
    sub.add_argument(
        "--time-column",
        help="--split time: column of times; the newest rows form the test split, the rows before them validation",
    )
    sub.add_argument(
        "--split-column", help="column whose values are train, validation, test or none, for --split column"
    )
    sub.add_argument(
        "--whole-documents", action="store_true", help="--split random: rows of one document also share a split"
    )
    sub.add_argument("--each-of", metavar="COLUMN", help="a list column to explode: one row per value")
    sub.add_argument("--beir", type=Path, metavar="DIR", help="also write a BEIR collection, for bigdssm evaluate")
    sub.add_argument("--raw-text", action="store_true", help="store raw query texts; loaders tokenize them")
    sub.add_argument("--dedup", action="store_true", help="drop repeated (query, document) pairs")
    _add_split_sizes(sub, "--split random or time")


def _split_help(default: str) -> str:
    return (
        f"split method (default: {default}; with --append, the method of the dataset; rows newer than its test split "
        "are then train rows)"
    )


def _add_split_sizes(sub: argparse.ArgumentParser, when: str) -> None:
    for option in ("--validation-fraction", "--test-fraction"):
        help_text = f"fraction of the rows, {when} (default: %(default)s)"
        sub.add_argument(option, type=float, default=0.05, help=help_text)
    time = "a number in the unit of the time column, or a date such as 2016-01-31"
    sub.add_argument(
        "--validation-from", metavar="TIME",
        help=f"--split time: start time of the validation split, in place of fractions; {time}",
    )  # fmt: skip
    sub.add_argument(
        "--test-from", metavar="TIME",
        help="start of test, with --validation-from; use the same time for both to omit the validation split",
    )  # fmt: skip
    sub.add_argument("--until", metavar="TIME", help="drop rows from this time on, with --test-from")


def _interactions(args: argparse.Namespace) -> None:
    _make(
        args,
        interactions=args.interactions,
        items=args.items,
        users=args.users,
        user_column=args.user_column,
        item_column=args.item_column,
        time_column=args.time_column,
        items_time_column=args.items_time_column,
        users_time_column=args.users_time_column,
        rating_column=args.rating_column,
        min_rating=args.min_rating,
        positive_rating=args.positive_rating,
        **{name: getattr(args, name) for name in SPLIT_OPTIONS},
    )


def _items(args: argparse.Namespace) -> None:
    if args.append is None or (args.items is None and args.withdrawn is None):
        raise ConfigError("make_shards items needs --append NAME, which adds to a dataset, and --items or --withdrawn")
    _make(
        args, items=args.items, withdrawn=args.withdrawn, item_column=args.item_column,
        items_time_column=args.items_time_column,
    )  # fmt: skip


def _pairs(args: argparse.Namespace) -> None:
    deciding = {"random": args.group_column, "time": args.time_column, "column": args.split_column}
    if args.split is None and args.append is not None:  # the dataset defines the method: any of the columns may apply
        decides = args.group_column or args.time_column or args.split_column
    else:
        decides = deciding[args.split or "random"] if args.split != "train" else None
    _make(
        args,
        pairs=args.pairs,
        doc_id_column=args.doc_id_column,
        query_id_column=args.query_id_column,
        relevance_column=args.relevance_column,
        split_column=decides,
        whole_documents=args.whole_documents,
        each_of=args.each_of,
        beir=args.beir,
        raw_text=args.raw_text,
        dedup=args.dedup,
        **{name: getattr(args, name) for name in SPLIT_OPTIONS},
    )


def _make(args: argparse.Namespace, **tables: Any) -> None:
    append = args.append is not None
    spark_settings = {}
    for word in args.spark_conf:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--spark-conf {word}: needs NAME=VALUE")
        spark_settings[name] = value
    with ProgressBar() as progress:
        report = make_dataset(
            args.config, args.overrides, out=args.out, partition=args.append if append else args.partition,
            append=append, overwrite=args.overwrite, seed=args.seed, like=args.like, progress=progress,
            engine=args.engine, processes=args.processes, master=args.master,
            spark_conf=spark_settings,
            **tables,
        )  # fmt: skip
    rows = ", ".join(f"{count:,} {split}" for split, count in report.rows.items())
    print(f"{report.out}, partition {report.partition}: {rows or 'no'} rows")
    changed = f", {report.changed_docs:,} changed" if report.changed_docs else ""
    new = f" ({report.new_docs:,} of them new{changed})" if report.new_docs != report.num_docs else ""
    speed = f", {sum(report.rows.values()) / report.seconds:,.0f} rows/s" if rows else ""
    print(f"{report.num_docs:,} documents{new}; {report.seconds:.1f} s{speed}")
    for note in report.notes:
        print(f"note: {note}")
    if report.num_bad:
        print(f"{report.num_bad:,} bad rows or values: {report.out}/quarantine.jsonl")


if __name__ == "__main__":
    raise SystemExit(main())
