"""Write a public set as tables for bigdssm make_shards.

    bigdssm make_tables sasrec --source ml-1m.txt --out datasets/source/ml-1m
    bigdssm make_tables s3rec --source FOLDER --out datasets/source/amazon_beauty
    bigdssm make_tables movielens-1m --source ml-1m --out datasets/source/ml-1m
    bigdssm make_tables movielens-latest --source ml-latest-small --out datasets/source/ml-latest
    bigdssm make_tables debian-build-depends --source FOLDER --out datasets/source/debian_build_depends

sasrec: a file of SASRec's repository, a line `user item` for each event, a user's in order of time.
s3rec: a file of S3-Rec's, a line `user item item …` for each user, or the folder that holds one. Attributes of items
are read from beside it if they are there: NAME_item2attributes.json of NAME.txt, item2attributes.json of sequences.txt.
movielens-1m: GroupLens' folder with ratings.dat, movies.dat, users.dat. Films without a rating are left out.
movielens-latest: GroupLens' folder with ratings.csv, movies.csv, tags.csv. All films stay.
debian-build-depends: the folder with build_depends.tsv and packages.jsonl, or with folders debian_build_depends and
debian_packages of them. A pair is of packages that at least two sources build from together, each pair once.

Files may be compressed (.xz, .gz, .zst). Out come pairs.tsv of debian-build-depends, of the others interactions.tsv,
items.tsv and, of movielens-1m, users.tsv. Every event stays, in the order of the source; sasrec and s3rec have no
times, their place in the sequence is `position`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import run_main
from bigdssm.ingest.public.make import READERS, make_tables


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(READERS), metavar="KIND", help=", ".join(READERS))
    parser.add_argument("--source", type=Path, required=True, help="the file or folder as it was published")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    args = parser.parse_args(argv)
    return run_main(lambda: _make(args))


def _make(args: argparse.Namespace) -> None:
    made = make_tables(args.kind, args.source, args.out)
    if "pairs" in made.rows:
        print(f"{args.out}: {made.rows['pairs']:,} pairs")
    else:
        events, items = made.rows["interactions"], made.rows["items"]
        print(f"{args.out}: {events:,} interactions of {made.num_users:,} users, {items:,} items")
    for note in made.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
