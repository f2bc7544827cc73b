"""Build a dataset from tables: shards, catalogue, tokenizer and schema.

    bigdssm make_shards interactions --config F [key=value …] --interactions F --items F [--users F]
    bigdssm make_shards items --config F [key=value …] --append NAME [--items F] [--withdrawn F]
    bigdssm make_shards pairs --config F [key=value …] --pairs F [F …] [--group-column C]
    bigdssm make_shards webdataset --config F [key=value …] --shards F [F …]

`--help` after a sub-command lists its options. The config's `data` section defines the schema. The dataset appears
atomically at the end. After a kill, run the same command with the same files to continue.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from bigdssm.cli import Declaration, add_options, command_parser, option, refuse_options, run_main
from bigdssm.errors import ConfigError
from bigdssm.features.times import DeclaredUnit
from bigdssm.ingest.api import EngineName, make_dataset
from bigdssm.sources.opening import SPARK_PREFIX
from bigdssm.utils.log import ProgressBar
from bigdssm.utils.urls import is_url


def _table(word: str) -> Path | str:
    """Return a URL or query unchanged, another word as a path."""
    return word if is_url(word) or word.startswith(SPARK_PREFIX) else Path(word)


def _is_override(word: str) -> bool:
    """Return True for key=value, which may be anywhere, including after a list of files."""
    return "=" in word and not word.startswith(("-", SPARK_PREFIX)) and not is_url(word) and not Path(word).exists()


def _split_options(methods: Sequence[str], when: str) -> list[Declaration]:
    """Declare the options of a split; the first of its methods is the default."""
    fraction = f"fraction of the rows, {when} (default: %(default)s)"
    time = "a number in the unit of the time column, or a date such as 2016-01-31"
    return [
        option(
            "--split",
            choices=methods,
            help=f"split method (default: {methods[0]}; with --append, the method of the dataset; rows newer than its "
            "test split are then train rows)",
        ),
        option("--validation-fraction", type=float, default=0.05, help=fraction),
        option("--test-fraction", type=float, default=0.05, help=fraction),
        option(
            "--validation-from",
            metavar="TIME",
            help=f"--split time: start time of the validation split, in place of fractions; {time}",
        ),
        option(
            "--test-from",
            metavar="TIME",
            help="start of test, with --validation-from; use the same time for both to omit the validation split",
        ),
        option("--until", metavar="TIME", help="drop rows from this time on, with --test-from"),
    ]


COMMON_OPTIONS = (
    option("--config", type=Path, required=True, help="YAML file; key=value arguments override its keys"),
    option("--out", type=_table, help="dataset folder, or a URL such as s3://… (default: data.dir of the config)"),
    option("--seed", type=int, default=0, help="seed of the shuffle and of random splits (default: %(default)s)"),
    option("--partition", default="base", help="name of the first partition of a new dataset (default: %(default)s)"),
    option("--overwrite", action="store_true", help="replace a dataset at --out, and any folder at --beir"),
    option("--like", type=Path, metavar="DIR", help="reuse the schema and tokenizer of this dataset"),
    option("--append", metavar="NAME", help="add a partition of this name to the dataset at --out"),
    option(
        "--engine", choices=get_args(EngineName), default="built-in", help="ingestion engine (default: %(default)s)"
    ),
    option("--processes", type=int, default=0, help="processes of the built-in engine (default: one per core)"),
    option("--master", metavar="URL", help="Spark master, with --engine spark: yarn, local[4] …"),
    option(
        "--spark-conf", metavar="K=V", action="append", default=[], help="Spark setting; repeatable (default: none)"
    ),
)
TIME_UNIT = option(
    "--time-unit",
    choices=get_args(DeclaredUnit),
    help="unit of the numbers in columns of times, since 1970 (default: data.time_unit; auto: the one in which all are "
    "dates of 1975 to 2100); with --append, that of the dataset",
)
PAIR_OPTIONS = (
    option("--doc-id-column", help="column of document ids (default: hash of all document features)"),
    option("--query-id-column", help="column of query ids (default: hash of all query features)"),
    option("--relevance-column", help="column of relevances (default: every relevance is 1)"),
    *_split_options(("random", "time", "column", "train"), "--split random or time"),
    option(
        "--group-column", help="--split random: rows with an equal value share a split (default: rows of one query)"
    ),
    option(
        "--time-column",
        help="--split time: column of times; the newest rows form the test split, the rows before them validation",
    ),
    TIME_UNIT,
    option("--split-column", help="column whose values are train, validation, test or none, for --split column"),
    option("--whole-documents", action="store_true", help="--split random: rows of one document also share a split"),
    option("--each-of", metavar="COLUMN", help="a list column to explode: one row per value"),
    option("--beir", type=Path, metavar="DIR", help="also write a BEIR collection, for bigdssm evaluate"),
    option("--raw-text", action="store_true", help="store raw query texts; loaders tokenize them"),
    option("--dedup", action="store_true", help="drop repeated (query, document) pairs"),
)
INTERACTION_OPTIONS = (
    option(
        "--interactions",
        type=_table,
        required=True,
        help="table of events: .tsv .csv .jsonl .parquet; optionally compressed (.gz .xz .zst)",
    ),
    option(
        "--items",
        type=_table,
        required=True,
        help="table of items, the catalogue; one row per item, or several with --items-time-column",
    ),
    option(
        "--users",
        type=_table,
        help="table of users, for query features other than histories; one row per user, or several with "
        "--users-time-column",
    ),
    option("--user-column", default="user_id", help="column of user ids (default: %(default)s)"),
    option("--item-column", default="item_id", help="column of item ids (default: %(default)s)"),
    option(
        "--time-column",
        default="timestamp",
        help="column of event times, '' if the events are in time order (default: %(default)s)",
    ),
    option(
        "--items-time-column",
        help="column of items with the time from which a row is valid: an event uses the latest row that is not newer",
    ),
    option(
        "--users-time-column",
        help="column of users with the time from which a row is valid: a dataset row uses the latest one that is not "
        "newer than its first target",
    ),
    TIME_UNIT,
    option("--rating-column", help="column of relevances (default: every relevance is 1)"),
    option("--min-rating", type=float, help="drop events with a lower rating (default: keep all)"),
    option(
        "--positive-rating",
        type=float,
        metavar="R",
        help="events with at least this rating have relevance 1, others 0: these are in histories, but are not learned "
        "or evaluated as targets",
    ),
    *_split_options(("leave-one-out", "time", "train"), "--split time"),
)
ITEM_OPTIONS = (
    option("--items", type=_table, help="table of new or changed items, or of withdrawn ones that are back"),
    option("--withdrawn", type=_table, help="table with the ids of items that are no longer offered"),
    option("--item-column", default="item_id", help="column of item ids (default: %(default)s)"),
    option("--items-time-column", help="column of items with the time from which a row is valid"),
    TIME_UNIT,
)
PAIR_TABLES = option(
    "--pairs",
    type=_table,
    nargs="+",
    required=True,
    help="tables, or folders of them: .tsv .csv .jsonl .parquet; optionally compressed (.gz .xz .zst)",
)
SHARD_TABLES = option(
    "--shards",
    dest="pairs",
    type=_table,
    nargs="+",
    required=True,
    help="WebDataset shards: .tar; optionally compressed, such as .tar.gz",
)
SUB_COMMANDS = {
    "interactions": ("rows (history → next item) from tables of events", INTERACTION_OPTIONS),
    "items": ("add items to a dataset without events, or withdraw some", ITEM_OPTIONS),
    "pairs": ("rows with query and document features", (PAIR_TABLES, *PAIR_OPTIONS)),
    "webdataset": (
        "pairs from WebDataset shards; columns from the .json of a sample, or from its .query.txt and .doc.txt",
        (SHARD_TABLES, *PAIR_OPTIONS),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(title="sub-commands", required=True)
    parsers = {}
    for name, (about, options) in SUB_COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=about)
        add_options(parsers[name], (*COMMON_OPTIONS, *options))
        parsers[name].set_defaults(kind=name)
    args, rest = parser.parse_known_args(argv)
    files = getattr(args, "pairs", [])
    overrides = [word for word in [*rest, *map(str, files)] if _is_override(word)]
    if unknown := [word for word in rest if not _is_override(word)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if files:
        args.pairs = [path for path in files if not _is_override(str(path))]
    default = parsers[args.kind].get_default
    args.changed_options = {name for name in ("overwrite", "partition") if getattr(args, name) != default(name)}

    def run() -> None:
        if args.append is not None:
            refuse_options(args, ["--overwrite", "--partition"], "with --append, which names the partition")
        options = {name: value for name, value in vars(args).items() if name not in ("kind", "changed_options")}
        _make(args.kind, options, overrides)

    return run_main(run)


def _make(kind: str, options: dict[str, Any], overrides: Sequence[str]) -> None:
    """Build a dataset; the options are parameters of `make_dataset`, except those replaced here."""
    append = options.pop("append")
    if kind == "items" and (append is None or (options["items"] is None and options["withdrawn"] is None)):
        raise ConfigError("make_shards items needs --append NAME, which adds to a dataset, and --items or --withdrawn")
    if "group_column" in options:  # of pairs: the column that decides the split
        columns = {
            "random": options.pop("group_column"),
            "time": options.pop("time_column"),
            "column": options["split_column"],
            "train": None,
        }
        if options["split"] is None and append is not None:  # the dataset defines the method: any of them may apply
            options["split_column"] = columns["random"] or columns["time"] or columns["column"]
        else:
            options["split_column"] = columns[options["split"] or "random"]
    spark_conf = {}
    for word in options.pop("spark_conf"):
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--spark-conf {word}: needs NAME=VALUE")
        spark_conf[name] = value
    if append is not None:
        options["partition"] = append
    with ProgressBar() as progress:
        report = make_dataset(
            options.pop("config"),
            overrides,
            append=append is not None,
            spark_conf=spark_conf,
            progress=progress,
            **options,
        )
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
