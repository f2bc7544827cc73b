"""Plot the curves of runs: loss, validation metric, alpha and rows/s over steps.

    bigdssm plot_run RUN [RUN …] --out CURVES.png

RUN is a run folder, whose stages are plotted consecutively, or a stage folder. Several runs are overlaid.
"""

import argparse
from pathlib import Path

from bigdssm.cli import OVERWRITE, check_file_to_write, command, option
from bigdssm.cluster.metrics import plot_runs
from bigdssm.errors import ConfigError

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")


@command(
    option("runs", type=Path, nargs="+", metavar="RUN", help="run or stage folder"),
    option("--out", type=Path, required=True, metavar="IMAGE", help="image file: .png, .svg or .pdf"),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file_to_write("--out", args.out, "plot_run", overwrite=args.overwrite)
    if args.out.suffix.lower() not in IMAGE_SUFFIXES:
        raise ConfigError(f"--out {args.out}: needs a file name ending in {' or '.join(IMAGE_SUFFIXES)}")
    plot_runs(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    raise SystemExit(main())
