"""Compare two runs: config, versions, data, and results with 95 % confidence intervals.

    bigdssm compare_runs A B [--stage sft] [--split test]

A and B are run folders or stage folders. Run folders are compared at the last stage that both contain. The best models
of both are evaluated on the same rows: those of A's dataset, or of --data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bigdssm.cli import command, command_parser
from bigdssm.evaluation.comparison import differences, table
from bigdssm.evaluation.run_comparison import compare
from bigdssm.utils.progress import ProgressBar


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="run or stage folder")
    parser.add_argument("b", type=Path, metavar="B", help="run or stage folder to compare with")
    parser.add_argument(
        "--stage", choices=["pretrain", "sft"], help="stage to compare (default: the last stage that both runs contain)"
    )
    parser.add_argument("--split", default="validation", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--data", help="dataset folder or URL (default: the dataset of A)")
    args = parser.parse_args(argv)
    with ProgressBar() as progress:
        found = compare(args.a, args.b, args.stage, args.split, args.data, progress)
    console = Console()
    print(f"A  {args.a}\nB  {args.b}\nstage {found.stage}\n")
    for title, rows in found.parts.items():
        if not rows:
            print(f"{title}: identical\n")
            continue
        drawn = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
        for column in ("", "A", "B"):
            drawn.add_column(column, overflow="fold")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
    if found.systems is None:
        print(f"results not measured: {found.skip_reason}")
        return
    a, b = found.systems
    console.print(table([a, b], f"{args.split}, {len(a.values['mrr'])} rows"))
    for line in differences([(b, a)]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
