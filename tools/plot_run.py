"""Draw the curves of runs: loss, validation NDCG@10, alpha and rows/s over steps.

    python tools/plot_run.py RUN [RUN …] --out CURVES.png

RUN is a run folder, whose stages are drawn one after another, or a single stage's folder. Several runs are overlaid.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bigdssm.cli import run_main
from bigdssm.running.records import plot_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run or stage folder")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="where the picture goes")
    args = parser.parse_args()
    plot_runs(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(run_main(main))
