"""Ask a run to stop, from any machine that sees its folder, and wait until it has.

    bigdssm stop_run RUN --save

RUN is a run folder or a stage's folder. With --save the ranks finish their step, save and exit with code 75, and
--resume auto goes on from there; without it they end at once, and what came after the last checkpoint is lost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import command
from bigdssm.cluster.run_folder import find_running, request_stop


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run or stage folder")
    parser.add_argument("--save", action="store_true", help="save a checkpoint first")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="how long to wait for the end (%(default)s)")
    args = parser.parse_args(argv)
    folder = find_running(args.run)
    end = request_stop(folder, args.save, args.timeout_s)
    print(f"{folder}: {end['reason']}")


if __name__ == "__main__":
    sys.exit(main())
