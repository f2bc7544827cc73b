"""Stop a run from any machine that has access to its folder, and wait for its end.

    bigdssm stop_run RUN

RUN is a run folder or a stage folder. The ranks finish their step, save a checkpoint for --resume auto and exit with
code 75; with --now they end at once, and the steps after the last checkpoint are lost.
"""

import argparse
from pathlib import Path

from bigdssm.cli import command, option
from bigdssm.cluster.run_folder import find_running, request_stop


@command(
    option("run", type=Path, metavar="RUN", help="run or stage folder"),
    option("--now", action="store_true", help="end at once, without saving"),
    option("--timeout-s", type=float, default=600.0, help="seconds to wait (default: %(default)s)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    folder = find_running(args.run)
    end = request_stop(folder, saving=not args.now, timeout_s=args.timeout_s)
    print(f"{folder}: {end['reason']}")


if __name__ == "__main__":
    raise SystemExit(main())
