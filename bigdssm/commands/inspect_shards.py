"""Say what is in a dataset, or, with --verify, check all of it.

    bigdssm inspect_shards datasets/movielens_100k
    bigdssm inspect_shards datasets/movielens_100k --verify

The exit code of --verify is 3 where anything is damaged.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bigdssm.cli import ProgressBar, run_main
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.ingest.verification import verify_dataset
from bigdssm.loader.inspection import PERCENTILES, Description, describe, sample_rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="dataset folder, or its URL")
    parser.add_argument("--verify", action="store_true", help="check all checksums and rows, print nothing else")
    parser.add_argument("--split", default="train", help="of lengths, duplicates and rows (default: train)")
    parser.add_argument("--rows", type=int, default=10, help="how many decoded rows to print (default: 10)")
    args = parser.parse_args(argv)
    return run_main(lambda: _verify(args) if args.verify else _inspect(args))


def _verify(args: argparse.Namespace) -> None:
    with ProgressBar() as progress:
        damages = verify_dataset(args.dataset, progress)
    for damage in damages:
        print(damage)
    if damages:
        raise DataError(f"{args.dataset} is damaged in {len(damages)} places; the first: {damages[0]}")
    print(f"{args.dataset}: all checksums are right")


def _inspect(args: argparse.Namespace) -> None:
    if args.rows < 0:
        raise ConfigError(f"--rows {args.rows}: needs at least 0")
    dataset = Dataset.open(args.dataset)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    _print_description(console, describe(dataset, args.split), args.split)
    for row in sample_rows(dataset, args.split, args.rows) if args.rows else []:
        console.print(f"\nrow {row.pop('row')}", style="bold")
        for name, value in row.items():
            console.print(f"  {name}: {' | '.join(value) if isinstance(value, list) else value}", markup=False)


def _print_description(console: Console, found: Description, split: str) -> None:
    sizes = _table("partition", "split", "rows", "queries", "blocks", "shards", "bytes", "bytes/row")
    for s in found.sizes:
        sizes.add_row(
            s.partition, s.split, *(f"{n:,}" for n in (s.rows, s.queries, s.blocks, s.shards, s.num_bytes)),
            f"{s.num_bytes / max(1, s.rows):.1f}",
        )  # fmt: skip
    console.print(sizes)
    schema = _table("feature", "type", "column", "fitted")
    for side, feature in found.features:
        schema.add_row(f"{side}.{feature.name}", feature.type, feature.source, feature.describe(found.vocab_size))
    console.print(schema)
    lengths = _table("lengths", *(f"{p}%" for p in PERCENTILES), "cut", "0 … longest")
    for entry in found.lengths:
        cut = "" if entry.cut is None else f"{entry.cut:.1%}"
        lengths.add_row(entry.feature, *map(str, entry.percentiles), cut, _bars(entry.histogram))
    console.print(lengths)
    top = _table("most frequent documents", "train positives")
    for title, count in found.top_docs:
        top.add_row(title, f"{count:,}")
    console.print(top)
    console.print(f"{found.num_docs:,} documents, {found.docs_without_train_rows:,} of them without a train row")
    if found.num_versions:
        console.print(f"{found.num_versions:,} further versions of documents, seen as of each {found.seen_as_of}")
    console.print(
        f"{found.duplicate_pairs:,} of {found.scanned_queries:,} {split} queries repeat a (query, document) pair"
    )
    console.print(f"{found.num_bad:,} bad rows or values in the source (quarantine.jsonl)")
    if found.unreadable_blocks:
        console.print(f"{found.unreadable_blocks:,} blocks cannot be read: use --verify", style="bold red")


def _table(*headers: str) -> Table:
    table = Table()
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "default", overflow="fold")
    return table


def _bars(counts: Sequence[int]) -> str:
    """Return a character for each count, as high as it is among them; a blank is 0."""
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // max(1, *counts))] for count in counts)


if __name__ == "__main__":
    sys.exit(main())
