"""Makes a dataset that training reads: shards, catalogue, tokenizer and schema, from tables as they are.

    python tools/make_shards.py interactions --config F --interactions F --items F [--users F] [key=value …]

`--help` behind a sub-command says everything it takes. The schema comes from the config's `data` section.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import ProgressBar, run_main
from bigdssm.config import DataConfig, load_config
from bigdssm.data.interactions import InteractionTables, make_interactions
from bigdssm.data.making import Report, Target


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_main(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="sub-commands", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, required=True, help="YAML file; its data section is the schema")
    common.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, dotted keys")
    common.add_argument("--out", type=Path, help="dataset folder (default: the config's data.dir)")
    common.add_argument("--seed", type=int, default=0, help="of the shuffle and of random splits")
    common.add_argument("--partition", default="base", help="name of a new dataset's first partition")
    common.add_argument("--overwrite", action="store_true", help="replace the dataset that stands at --out")
    common.add_argument("--append", metavar="NAME", help="add a partition to the dataset at --out")

    name = "interactions"
    sub = commands.add_parser(name, parents=[common], help="(history → next item) from user, item, time events")
    sub.set_defaults(run=_interactions)
    sub.add_argument("--interactions", type=Path, required=True, help="events: .tsv .csv .jsonl .parquet, also .xz …")
    sub.add_argument("--items", type=Path, required=True, help="one row per item; the whole becomes the catalogue")
    sub.add_argument("--users", type=Path, help="one row per user; needed for query features other than histories")
    sub.add_argument("--user-column", default="user_id")
    sub.add_argument("--item-column", default="item_id")
    sub.add_argument("--time-column", default="timestamp", help="'' where the events stand in order of time")
    sub.add_argument("--rating-column", help="becomes the relevance, which is 1 otherwise")
    sub.add_argument("--min-rating", type=float, help="events rated lower are left out")
    sub.add_argument("--split", choices=("leave-one-out", "time", "train"), default="leave-one-out")
    _add_fractions(sub, "--split time")
    return parser


def _add_fractions(sub: argparse.ArgumentParser, when: str) -> None:
    sub.add_argument("--validation-fraction", type=float, default=0.05, help=f"with {when} (default: 0.05)")
    sub.add_argument("--test-fraction", type=float, default=0.05, help=f"with {when} (default: 0.05)")


def _interactions(args: argparse.Namespace) -> None:
    tables = InteractionTables(
        interactions=args.interactions,
        items=args.items,
        users=args.users,
        user_column=args.user_column,
        item_column=args.item_column,
        time_column=args.time_column or None,
        rating_column=args.rating_column,
        min_rating=args.min_rating,
        split=args.split,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
    )
    config, target = _data_and_target(args)
    with ProgressBar() as progress:
        report = make_interactions(config, tables, target, progress)
    _print(report)


def _data_and_target(args: argparse.Namespace) -> tuple[DataConfig, Target]:
    data = load_config(args.config, args.overrides).data
    out, partition = args.out or Path(data.dir), args.append or args.partition
    return data, Target(out, partition, overwrite=args.overwrite, append=args.append is not None, seed=args.seed)


def _print(report: Report) -> None:
    rows = ", ".join(f"{count:,} {split}" for split, count in report.rows.items())
    print(f"{report.out}, partition {report.partition}: {rows} rows")
    new = f" ({report.new_docs:,} of them new)" if report.new_docs != report.num_docs else ""
    print(f"{report.num_docs:,} documents{new}; {report.seconds:.1f} s, {report.rows_per_s:,.0f} rows/s")
    for note in report.notes:
        print(f"note: {note}")
    if report.num_bad:
        print(f"{report.num_bad:,} bad rows or values: {report.out / 'quarantine.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())
