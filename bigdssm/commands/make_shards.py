"""Make a dataset of tables as they are: shards, catalogue, tokenizer and schema.

    bigdssm make_shards interactions --config F [key=value …] --interactions F --items F [--users F]
    bigdssm make_shards pairs --config F [key=value …] --pairs F [F …] [--group-column C]
    bigdssm make_shards webdataset --config F [key=value …] --shards F [F …]

`--help` behind a sub-command says everything it takes. The schema comes from the config's `data` section. The dataset
appears whole at the end. A making that was killed goes on where it was when the same command is given again over the
same files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from bigdssm.cli import ProgressBar, refuse_options, run_main
from bigdssm.errors import ConfigError
from bigdssm.ingest.api import EngineName, make_dataset
from bigdssm.ingest.engines.spark import PREFIX
from bigdssm.ingest.job import IngestReport
from bigdssm.utils.urls import is_url


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
    return run_main(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.append is not None:
        refuse_options(args.common, args, ["--overwrite", "--partition"], "with --append, which names what it adds")
    args.run(args)


def _table(word: str) -> Path | str:
    """Return what names a table: a path, or a URL or query as it is."""
    return word if is_url(word) or word.startswith(PREFIX) else Path(word)


def _setting(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"--spark-conf {word}: needs NAME=VALUE")
    return name, value


def _is_override(word: str) -> bool:
    """Return True for key=value, which may stand anywhere, behind a list of files too."""
    return "=" in word and not word.startswith(("-", PREFIX)) and not Path(word).exists()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="sub-commands", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.set_defaults(common=common)
    common.add_argument("--config", type=Path, required=True, help="YAML file, and anywhere key=value to change it")
    common.add_argument(
        "--out", type=_table, help="dataset folder, or a URL such as s3://… (default: the config's data.dir)"
    )
    common.add_argument("--seed", type=int, default=0, help="of the shuffle and of random splits")
    common.add_argument("--partition", default="base", help="name of a new dataset's first partition (%(default)s)")
    common.add_argument("--overwrite", action="store_true", help="replace the dataset that stands at --out")
    common.add_argument("--like", type=Path, metavar="DIR", help="take the schema and tokenizer of that dataset")
    common.add_argument("--append", metavar="NAME", help="add a partition to the dataset at --out")
    common.add_argument("--engine", choices=get_args(EngineName), default="built-in", help="who makes it (%(default)s)")
    common.add_argument("--processes", type=int, default=0, help="of the built-in engine (default: one for each core)")
    common.add_argument("--master", metavar="URL", help="of --engine spark: spark://HOST:PORT, yarn, local[4] …")
    common.add_argument(
        "--spark-conf", metavar="K=V", action="append", default=[], help="a setting of Spark; repeat it"
    )

    name = "interactions"
    sub = commands.add_parser(name, parents=[common], help="(history → next item) from user, item, time events")
    sub.set_defaults(run=_interactions)
    sub.add_argument("--interactions", type=_table, required=True, help="events: .tsv .csv .jsonl .parquet, also .xz …")
    sub.add_argument(
        "--items",
        type=_table,
        required=True,
        help="one row per item, or several with --items-time-column; the whole becomes the catalogue",
    )
    sub.add_argument(
        "--users",
        type=_table,
        help="one row per user, or several with --users-time-column; needed for query features but histories",
    )
    sub.add_argument("--user-column", default="user_id", help="(%(default)s)")
    sub.add_argument("--item-column", default="item_id", help="(%(default)s)")
    sub.add_argument("--time-column", default="timestamp", help="'' if events are in order of time (%(default)s)")
    sub.add_argument("--items-time-column", help="from when on a row of items holds: events see the newest before them")
    sub.add_argument("--users-time-column", help="from when on a row of users holds: rows see the newest before them")
    sub.add_argument("--rating-column", help="becomes the relevance, which is 1 otherwise")
    sub.add_argument("--min-rating", type=float, help="events rated lower are left out")
    sub.add_argument(
        "--positive-rating", type=float, metavar="R", help="relevance 1 from this rating on, else 0: met, but no target"
    )
    sub.add_argument("--split", choices=("leave-one-out", "time", "train"), help=_default_split("leave-one-out"))
    _add_fractions(sub, "--split time")
    _add_moments(sub)

    sub = commands.add_parser("pairs", parents=[common], help="query and document features in one row")
    sub.add_argument("--pairs", type=_table, nargs="+", required=True, help="tables: .tsv .csv .jsonl .parquet, .xz …")
    _add_pair_options(sub)

    sub = commands.add_parser(
        "webdataset",
        parents=[common],
        help="pairs from plain WebDataset shards: a sample's .json gives the columns, or .query.txt and .doc.txt",
    )
    sub.add_argument("--shards", dest="pairs", type=_table, nargs="+", required=True, help=".tar, also .tar.gz …")
    _add_pair_options(sub)

    return parser


def _add_pair_options(sub: argparse.ArgumentParser) -> None:
    sub.set_defaults(run=_pairs)
    sub.add_argument("--doc-id-column", help="default: documents are the same where all their features are")
    sub.add_argument("--query-id-column", help="default: queries are the same where all their features are")
    sub.add_argument("--relevance-column", help="default: every relevance is 1")
    sub.add_argument("--split", choices=("random", "time", "column", "train"), help=_default_split("random"))
    sub.add_argument("--group-column", help="--split random: its rows stay together (default: rows of one query)")
    sub.add_argument("--time-column", help="--split time: the newest rows are test, the ones before validation")
    sub.add_argument("--split-column", help="--split column: says train, validation, test or none")
    sub.add_argument("--whole-documents", action="store_true", help="--split random: so do rows of one document")
    sub.add_argument("--each-of", metavar="COLUMN", help="a list column: every value makes a row")
    _add_beir(sub)
    sub.add_argument("--raw-text", action="store_true", help="leave queries' texts as they are: loaders tokenise them")
    sub.add_argument("--dedup", action="store_true", help="leave out repeated (query, document) pairs")
    _add_fractions(sub, "--split random or time")
    _add_moments(sub)


def _default_split(default: str) -> str:
    return f"(default: {default}; with --append that of the dataset, and what is newer than its test split is train)"


def _add_beir(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--beir", type=Path, metavar="DIR", help="also write a BEIR collection, for bigdssm evaluate")


def _add_fractions(sub: argparse.ArgumentParser, when: str) -> None:
    sub.add_argument("--validation-fraction", type=float, default=0.05, help=f"with {when} (default: 0.05)")
    sub.add_argument("--test-fraction", type=float, default=0.05, help=f"with {when} (default: 0.05)")


def _add_moments(sub: argparse.ArgumentParser) -> None:
    told = "a number as in the time column, or 2016-01-31"
    sub.add_argument("--validation-from", metavar="TIME", help=f"--split time: in place of the fractions; {told}")
    sub.add_argument("--test-from", metavar="TIME", help="goes with it; may be the same, for no validation split")
    sub.add_argument("--until", metavar="TIME", help="beside these: rows from then on are left out")


def _moments(args: argparse.Namespace) -> dict[str, str | None]:
    return {"validation_from": args.validation_from, "test_from": args.test_from, "until": args.until}


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
        split=args.split,
        **_moments(args),
    )


def _pairs(args: argparse.Namespace) -> None:
    deciding = {"random": args.group_column, "time": args.time_column, "column": args.split_column}
    if args.split is None and args.append is not None:  # the dataset's own split, maybe of a column with another name
        decides = args.group_column or args.time_column or args.split_column
    else:
        decides = deciding[args.split or "random"] if args.split != "train" else None
    _make(
        args,
        pairs=args.pairs,
        doc_id_column=args.doc_id_column,
        query_id_column=args.query_id_column,
        relevance_column=args.relevance_column,
        split=args.split,
        split_column=decides,
        whole_documents=args.whole_documents,
        each_of=args.each_of,
        beir=args.beir,
        raw_text=args.raw_text,
        dedup=args.dedup,
        **_moments(args),
    )


def _make(args: argparse.Namespace, **tables: Any) -> None:
    append = args.append is not None
    with ProgressBar() as progress:
        report = make_dataset(
            args.config, args.overrides, out=args.out, partition=args.append if append else args.partition,
            append=append, overwrite=args.overwrite, seed=args.seed, like=args.like, progress=progress,
            engine=args.engine, processes=args.processes, master=args.master,
            spark_conf=dict(map(_setting, args.spark_conf)),
            validation_fraction=args.validation_fraction, test_fraction=args.test_fraction, **tables,
        )  # fmt: skip
    _print(report)


def _print(report: IngestReport) -> None:
    rows = ", ".join(f"{count:,} {split}" for split, count in report.rows.items())
    print(f"{report.out}, partition {report.partition}: {rows} rows")
    changed = f", {report.changed_docs:,} changed" if report.changed_docs else ""
    new = f" ({report.new_docs:,} of them new{changed})" if report.new_docs != report.num_docs else ""
    print(f"{report.num_docs:,} documents{new}; {report.seconds:.1f} s, {report.rows_per_s:,.0f} rows/s")
    for note in report.notes:
        print(f"note: {note}")
    if report.num_bad:
        print(f"{report.num_bad:,} bad rows or values: {report.out}/quarantine.jsonl")


if __name__ == "__main__":
    sys.exit(main())
