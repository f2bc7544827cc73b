"""Print a summary of a dataset, or, with --verify, validate all of its files.

    bigdssm inspect_shards datasets/movielens_100k
    bigdssm inspect_shards datasets/movielens_100k --verify
    bigdssm inspect_shards datasets/shop --config shop.yaml

With --config, rows and queries are those of the config's data.targets and data.visit. The exit code of --verify is 3
if anything is damaged.
"""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from bigdssm.cli import RULES, command, open_with_rules, option
from bigdssm.errors import ConfigError, DataError
from bigdssm.loader.inspection import PERCENTILES, describe, sample_rows, verify_dataset
from bigdssm.utils.log import ProgressBar


@command(
    option("dataset", help="dataset folder or URL"),
    option("--verify", action="store_true", help="validate all checksums and rows; omit the summary"),
    option("--split", default="train", help="split for lengths, duplicates and rows (default: %(default)s)"),
    RULES,
    option("--rows", type=int, default=10, help="number of decoded rows to print (default: %(default)s)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if not args.verify:
        _inspect(args)
        return
    with ProgressBar() as progress:
        problems = verify_dataset(args.dataset, progress)
    for problem in problems:
        print(problem)
    if problems:
        raise DataError(f"{args.dataset} has {len(problems)} damaged files or blocks, first: {problems[0]}")
    print(f"{args.dataset}: all checksums and rows are valid")


def _inspect(args: argparse.Namespace) -> None:
    if args.rows < 0:
        raise ConfigError(f"--rows {args.rows}: needs at least 0")
    dataset = open_with_rules(args.dataset, args.config)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    content = describe(dataset, args.split)
    sizes = _table("partition", "split", "rows", "queries", "blocks", "shards", "bytes", "bytes/row")
    for s in content.sizes:
        sizes.add_row(
            s.partition, s.split, *(f"{n:,}" for n in (s.rows, s.queries, s.blocks, s.shards, s.num_bytes)),
            f"{s.num_bytes / max(1, s.rows):.1f}",
        )  # fmt: skip
    console.print(sizes)
    schema = _table("feature", "type", "column", "parameters")
    for side, feature in content.features:
        schema.add_row(f"{side}.{feature.name}", feature.type, feature.source, feature.describe(content.vocab_size))
    console.print(schema)
    lengths = _table("lengths", *(f"{p}%" for p in PERCENTILES), "truncated", "histogram (0 to maximum length)")
    for entry in content.lengths:
        truncated = "" if entry.cut is None else f"{entry.cut:.1%}"
        largest = max(1, *entry.histogram)
        # eighths of the largest count, rounded up, so that only 0 is blank
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // largest)] for count in entry.histogram)
        lengths.add_row(entry.feature, *map(str, entry.percentiles), truncated, bars)
    console.print(lengths)
    top = _table("most frequent documents", "train positives")
    for title, count in content.top_docs:
        top.add_row(title, f"{count:,}")
    console.print(top)
    console.print(f"{content.num_docs:,} documents, {content.docs_without_train_rows:,} of them without a train row")
    if content.num_withdrawn:
        console.print(f"{content.num_withdrawn:,} of them withdrawn")
    if content.num_versions:
        console.print(
            f"{content.num_versions:,} further document versions; histories use those that were current at the time of "
            f"their {content.seen_as_of}, all other work the newest"
        )
    console.print(
        f"{content.duplicate_pairs:,} of {content.scanned_queries:,} {args.split} queries repeat a (query, document) "
        "pair"
    )
    console.print(f"{content.num_bad:,} bad rows or values in the source (quarantine.jsonl)")
    if content.unreadable_blocks:
        console.print(f"{content.unreadable_blocks:,} blocks cannot be read: use --verify", style="bold red")
    for row in sample_rows(dataset, args.split, args.rows) if args.rows else []:
        console.print(f"\nrow {row.pop('row')}", style="bold")
        for name, value in row.items():
            text = " | ".join(map(str, value)) if isinstance(value, list) else value
            console.print(f"  {name}: {text}", markup=False)


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # the numbers fit into 80 columns
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "default", overflow="fold")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
