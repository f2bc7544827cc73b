"""Convert a public dataset to tables for make_shards.

    python -m tools.public_data movielens-100k --out datasets/source/ml-100k                    # from recbole's wheel
    python -m tools.public_data movielens-100k --out datasets/source/ml-100k --movielens PATH   # from a copy
    python -m tools.public_data sasrec --source ml-1m.txt --out datasets/source/ml-1m
    python -m tools.public_data s3rec --source FOLDER --out datasets/source/amazon_beauty
    python -m tools.public_data movielens-1m --source ml-1m --out datasets/source/ml-1m
    python -m tools.public_data movielens-latest --source ml-latest-small --out datasets/source/ml-latest
    python -m tools.public_data debian-build-depends --source FOLDER --out datasets/source/debian_build_depends
    python -m tools.public_data docstrings --out datasets/source/docstrings.jsonl.gz [--packages NAME …]

movielens-100k: interactions, films and users as ml-100k.inter, .item and .user; the repository contains none of it.
sasrec: a file of SASRec's repository, one line `user item` per event, in time order per user.
s3rec: a file of S3-Rec, one line `user item item …` per user, or its folder. Attributes of items are read from the same
folder if they exist: NAME_item2attributes.json for NAME.txt, item2attributes.json for sequences.txt.
movielens-1m: GroupLens' folder with ratings.dat, movies.dat, users.dat. Films without ratings are dropped.
movielens-latest: GroupLens' folder with ratings.csv, movies.csv, tags.csv, including films without ratings.
debian-build-depends: the folder with build_depends.tsv and packages.jsonl, or with the subfolders debian_build_depends
and debian_packages. Pairs are packages that at least two sources have as common build dependencies, each pair once.
docstrings: pairs docstring → source of the functions of installed packages, which are parsed, not imported.

Files may be compressed (.xz, .gz, .zst). A --source is converted to pairs.tsv (debian-build-depends), or to
interactions.tsv, items.tsv and, for movielens-1m, users.tsv. All events are kept in the order of the source; sasrec and
s3rec have no times, the index in the sequence is `position`.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import at_least, run_main
from bigdssm.utils.log import ProgressBar
from tools.public_data.docstrings import write_functions
from tools.public_data.movielens_100k import TERMS, copy_movielens, fetch_movielens
from tools.public_data.tables import READERS, make_tables


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tools.public_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    sub = names.add_parser("movielens-100k", help="download with pip, from the wheel of recbole 1.2.1")
    sub.set_defaults(run=_movielens_100k)
    sub.add_argument("--out", type=Path, required=True, help="folder for ml-100k.inter, .item and .user")
    sub.add_argument(
        "--downloads", type=Path, default=Path("downloads"), help="folder for the wheel (default: %(default)s)"
    )
    sub.add_argument("--movielens", type=Path, help="local copy: the same files, or u.data, u.item, u.user")
    for name in READERS:
        sub = names.add_parser(name, help="convert a local copy in its published layout")
        sub.set_defaults(run=_tables)
        sub.add_argument("--source", type=Path, required=True, help="file or folder as published")
        sub.add_argument("--out", type=Path, required=True, help="folder for the tables")
    sub = names.add_parser("docstrings", help="docstring → source of the functions of installed packages")
    sub.set_defaults(run=_docstrings)
    sub.add_argument("--out", type=Path, required=True, help=".jsonl.gz file for the functions")
    sub.add_argument(
        "--site-packages", type=Path, default=Path(sysconfig.get_path("purelib")),
        help="folder with packages (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--packages", nargs="+", default=(), help="packages to read (default: all)")
    sub.add_argument("--max-per-package", type=at_least(0), default=0, help="functions per package (default: 0, all)")
    sub.add_argument("--seed", type=int, default=0, help="seed of this sample (default: %(default)s)")
    args = parser.parse_args(argv)
    return run_main(lambda: args.run(args))


def _movielens_100k(args: argparse.Namespace) -> None:
    print(TERMS)
    if args.movielens is not None:
        fresh = copy_movielens(args.movielens, args.out)
    else:
        fresh = fetch_movielens(args.out, args.downloads)
    print(f"{args.out}: {'written' if fresh else 'exists already'}")


def _tables(args: argparse.Namespace) -> None:
    written = make_tables(args.name, args.source, args.out)
    if "pairs" in written.rows:
        print(f"{args.out}: {written.rows['pairs']:,} pairs")
    else:
        events, items = written.rows["interactions"], written.rows["items"]
        print(f"{args.out}: {events:,} interactions of {written.num_users:,} users, {items:,} items")
    for note in written.notes:
        print(f"note: {note}")


def _docstrings(args: argparse.Namespace) -> None:
    with ProgressBar() as progress:
        count = write_functions(args.site_packages, args.out, args.packages, args.max_per_package, args.seed, progress)
    print(f"{args.out}: {count:,} functions")


if __name__ == "__main__":
    sys.exit(main())
