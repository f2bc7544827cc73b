"""Compute logged requests again from the dataset, and report where features or answers differ.

    bigdssm replay --log FOLDER --model MODEL --index INDEX [--data DATASET] [--limit 0.01] [--out REPORT.json]

FOLDER is that of bigdssm serve --log-requests. A request is computed with the events of its user up to the logged time.
It differs if a feature, a document, the order or a score does. The report has the share of requests that differ by
feature, the overlap of the answers, the largest difference of scores, and examples. MODEL may be a folder of model
folders: a request is computed with the model that answered it, if a collection of the store has its vectors. The exit
code is 3 if more than the share --limit of the requests differ.
"""

import argparse
import json
import sys
from pathlib import Path

from bigdssm.cli import OVERWRITE, RERANKING, SEARCH_OPTIONS, check_file_to_write, command, option
from bigdssm.errors import ConfigError, DataError
from bigdssm.serving.replay import replay
from bigdssm.serving.request_log import read_log
from bigdssm.serving.searcher import Folders
from bigdssm.utils.atomic import write_json
from bigdssm.utils.log import ProgressBar


@command(
    option("--log", type=Path, required=True, metavar="FOLDER", help="folder of serve --log-requests"),
    *SEARCH_OPTIONS,
    RERANKING,
    option(
        "--limit",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="maximum share of requests that may differ (default: %(default)s)",
    ),
    option("--out", type=Path, metavar="JSON", help="file for the report, with examples"),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file_to_write("--out", args.out, "replay", overwrite=args.overwrite)
    if not 0 <= args.limit <= 1:
        raise ConfigError(f"--limit {args.limit}: needs a share from 0 to 1")
    folders = Folders(args.model, args.index, args.data, rerank=args.rerank, reranker=args.reranker)
    with ProgressBar() as progress:
        report = replay(
            folders.open(), read_log(args.log), lambda done: progress("requests replayed", done, None),
            folders.open_model,
        )  # fmt: skip
    if args.out is not None:
        write_json(args.out, report)
    print(json.dumps({name: value for name, value in report.items() if name != "examples"}, indent=1))
    if report["differing"] > args.limit:
        raise DataError(
            f"{args.log}: {report['differing']:.2%} of the requests differ, more than --limit {args.limit:.2%}"
        )


if __name__ == "__main__":
    sys.exit(main())
