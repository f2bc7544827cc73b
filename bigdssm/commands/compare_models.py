"""Decide by exit code whether a new model may replace the live one, on newer requests.

    bigdssm compare_models LIVE NEW --data DATASET [--split test] [--margin 0.02]

Evaluates both models, and the strongest chain of last items (frozen, or rebuilt daily) if the dataset has histories, on
the same requests: if events have times, those after the newest training target of both models, else the held-out rows
of the newest partition that one of them was trained on, and later partitions. The last line has the difference NEW −
LIVE with its paired 95 % interval, and the verdict. Exit codes: 0, NEW is not worse than LIVE by more than the margin
(the interval is above −margin); 10, NEW is worse (the interval is below 0, and reaches below −margin); 11, undecided;
12, both have equal weights. Other codes are those of errors: nothing was decided.
"""

import argparse
from pathlib import Path

from rich.console import Console

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import DATA, command, option
from bigdssm.errors import ConfigError, Verdict
from bigdssm.evaluation.comparison import options_of, table
from bigdssm.evaluation.metrics import find_metric, means
from bigdssm.evaluation.succession import MARGIN, Succession, compare_models
from bigdssm.models.precision import PRECISION_HELP, PRECISIONS
from bigdssm.retrieval.embed import encode_in
from bigdssm.utils.log import ProgressBar, metric_label

WORDS = {
    Verdict.NOT_WORSE: "NEW is not worse than LIVE by more than the margin",
    Verdict.WORSE: "NEW is worse than LIVE",
    Verdict.UNDECIDED: "undecided: too few requests to exclude a loss above the margin",
}


@command(
    option("live", type=Path, metavar="LIVE", help="model folder of the served model"),
    option("new", type=Path, metavar="NEW", help="model folder that may replace it"),
    DATA,
    option("--split", default="test", help="split of the dataset (default: %(default)s)"),
    option("--metric", default="ndcg_at_10", help="metric that decides (default: %(default)s)"),
    option(
        "--margin",
        type=float,
        default=MARGIN,
        metavar="SHARE",
        help="accepted loss, as a share of the metric of LIVE (default: %(default)s)",
    ),
    option("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP),
)
def main(args: argparse.Namespace) -> int:
    """Run the command line."""
    metric = find_metric(args.metric, "--metric")
    if not 0 <= args.margin < 1:
        raise ConfigError(f"--margin {args.margin}: needs a share of at least 0 and below 1")
    live, new = (load_model_folder(path) for path in (args.live, args.new))
    for folder in (live, new):
        encode_in(folder.model, args.precision)
    with ProgressBar() as progress:
        result = compare_models(
            live, new, args.data, args.split, metric=metric, margin=args.margin, progress=progress
        )  # fmt: skip
    print_result(result, live.checksum, metric, args.margin)
    return int(result.verdict)


def print_result(result: Succession, checksum: str, metric: str, share: float) -> None:
    """Print the table, the measured requests and the verdict."""
    if result.requests is None or result.difference is None:
        print(f"LIVE and NEW have equal weights, model {checksum[:12]}: nothing to compare")
        return
    requests, (live, new, *chain) = result.requests, result.systems
    names = ", ".join(partition.name for partition in requests.dataset.partitions)
    Console().print(table(result.systems, f"{requests.split}, {len(live.values[metric])} requests of {names}"))
    lines = [f"requests newer than the {requests.since}", *options_of(chain)]
    for system in chain:
        behind = means(new.values)[metric] < means(system.values)[metric]
        lines += [f"{system.name} is better than NEW: {new.difference(system, metric)}"] * behind
    lines.append(
        f"{metric_label(metric)} NEW − LIVE {result.difference}, margin {result.margin:.4f} ({share:.0%} of LIVE): "
        f"{WORDS[result.verdict]}"
    )
    for line in lines:
        print(line)


if __name__ == "__main__":
    raise SystemExit(main())
