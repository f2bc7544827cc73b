"""Monitor a run in the terminal: progress, state, curves and alerts.

    bigdssm watch_run RUN [--once]

RUN is a run folder, whose newest stage is displayed, or a stage folder. It may be on a shared disk.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from bigdssm.cli import command, option
from bigdssm.cluster.monitor import RunState, read_run_state, sparkline


@command(
    option("run", type=Path, metavar="RUN", help="run or stage folder"),
    option("--once", action="store_true", help="print the state once and exit"),
    option("--every-s", type=float, default=2.0, help="seconds between updates (default: %(default)s)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if args.once:
        Console().print(_render(read_run_state(args.run)))
        return
    try:
        with Live(_render(read_run_state(args.run)), auto_refresh=False) as live:
            while not (state := read_run_state(args.run)).ended:
                live.update(_render(state), refresh=True)
                time.sleep(args.every_s)
            live.update(_render(state), refresh=True)
    except KeyboardInterrupt:  # Ctrl-C is the way to exit
        pass


def _render(run: RunState) -> Group:
    head = Text.assemble((str(run.folder), "bold"), "  ", run.state)
    figures = Table.grid(padding=(0, 3))
    for name, values in run.curves.items():
        figures.add_row(name, f"{values[-1]:.4g}", sparkline(values, 40))
    for name, value in run.figures.items():
        figures.add_row(name, value)
    total = max(run.total_steps, run.step, 1)  # 0 steps are known before the stage has started
    bar = Bar(total=total, completed=run.step, width=60)
    return Group(head, Text(f"step {run.step} of {run.total_steps or '?'}"), bar, figures, *map(Text, run.alerts))


if __name__ == "__main__":
    raise SystemExit(main())
