"""Follow a run in the terminal: how far it is, its curves and alerts, and whether it still trains.

    bigdssm watch_run RUN [--once]

RUN is a run folder, of which the newest stage is shown, or a stage's folder. It may be on a shared disk: nothing is
asked of the run itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from bigdssm.cli import command
from bigdssm.cluster.monitor import RunState, read_run_state, sparkline


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run or stage folder")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--every-s", type=float, default=2.0, help="how often to look (%(default)s)")
    args = parser.parse_args(argv)
    if args.once:
        Console().print(_drawn(read_run_state(args.run)))
        return
    try:
        with Live(_drawn(read_run_state(args.run)), auto_refresh=False) as live:
            while not (seen := read_run_state(args.run)).ended:
                live.update(_drawn(seen), refresh=True)
                time.sleep(args.every_s)
            live.update(_drawn(seen), refresh=True)
    except KeyboardInterrupt:  # the way out of it
        pass


def _drawn(seen: RunState) -> Group:
    head = Text.assemble((str(seen.folder), "bold"), "  ", seen.state)
    figures = Table.grid(padding=(0, 3))
    for name, values in seen.curves.items():
        figures.add_row(name, f"{values[-1]:.4g}", sparkline(values, 40))
    for name, value in seen.figures.items():
        figures.add_row(name, value)
    total = max(seen.total_steps, seen.step)
    bar = Bar(total=total or 1, completed=seen.step, width=60)
    return Group(head, Text(f"step {seen.step} of {seen.total_steps or '?'}"), bar, figures, *map(Text, seen.alerts))


if __name__ == "__main__":
    sys.exit(main())
