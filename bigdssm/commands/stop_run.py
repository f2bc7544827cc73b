"""Stop a run from any machine that has access to its folder, and wait for its end.

    bigdssm stop_run RUN

RUN is a run folder or a stage folder. The ranks finish their step, save a checkpoint for --resume auto and exit with
code 75; with --now they end at once, and the steps after the last checkpoint are lost.
"""

from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import command, command_parser
from bigdssm.cluster.run_folder import find_running, request_stop


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run or stage folder")
    parser.add_argument("--now", action="store_true", help="end at once, without saving")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="seconds to wait (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = find_running(args.run)
    end = request_stop(folder, saving=not args.now, timeout_s=args.timeout_s)
    print(f"{folder}: {end['reason']}")


if __name__ == "__main__":
    raise SystemExit(main())
