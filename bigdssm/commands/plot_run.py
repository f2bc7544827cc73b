"""Plot the curves of runs: loss, validation metric, alpha and rows/s over steps.

    bigdssm plot_run RUN [RUN …] --out CURVES.png

RUN is a run folder, whose stages are plotted consecutively, or a stage folder. Several runs are overlaid.
"""

from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import add_overwrite, check_file_to_write, command, command_parser
from bigdssm.cluster.metrics import plot_runs
from bigdssm.errors import ConfigError
from bigdssm.utils.atomic import mark_written

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run or stage folder")
    parser.add_argument("--out", type=Path, required=True, metavar="IMAGE", help="image file: .png, .svg or .pdf")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    check_file_to_write("--out", args.out, "plot_run", overwrite=args.overwrite)
    if args.out.suffix.lower() not in IMAGE_SUFFIXES:
        raise ConfigError(f"--out {args.out}: needs a file name ending in {' or '.join(IMAGE_SUFFIXES)}")
    plot_runs(args.runs, args.out)
    mark_written(args.out, "plot_run")
    print(args.out)


if __name__ == "__main__":
    raise SystemExit(main())
