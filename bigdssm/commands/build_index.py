"""Build a FAISS inner-product index from a folder of document vectors.

    bigdssm build_index --vectors VECTORS --out INDEX [--type flat|sq8|binary|hnsw|ivf|ivfpq]
    bigdssm build_index --vectors VECTORS --out INDEX --type hnsw links=64 search_width=400
    bigdssm build_index --vectors VECTORS --out INDEX --type binary --rescore 20
    bigdssm build_index --vectors VECTORS --out INDEX --type sq8 --width 64 --rescore 4

flat is exact; sq8 (int8) stores one byte per dimension, binary one bit; hnsw, ivf and ivfpq are fast on large
catalogues (tools/bench/bench_index.py measures their cost). KEY=VALUE sets an option of the type (docs/config_keys.md).
--width keeps only the first dimensions, for a model trained with loss.widths. With --rescore N the index retrieves N
candidates per requested document and re-ranks them with the full vectors, which stay on disk: scores are exact. The
index stores the checksum of its model and rejects queries of another model.
"""

import argparse
import time
from pathlib import Path

from bigdssm.cli import OVERWRITE, command, component_option, option
from bigdssm.config.loading import options_of
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.index_types import INDEX_TYPES


@command(
    option("--vectors", type=Path, required=True, help="folder written by bigdssm embed"),
    option("--out", type=Path, required=True, help="folder for the index"),
    component_option("--type", "index type", INDEX_TYPES, "flat"),
    option("options", nargs="*", metavar="KEY=VALUE", help="options of the index type"),
    option("--width", type=int, help="number of leading dimensions to index (default: all)"),
    option(
        "--rescore",
        type=int,
        default=0,
        metavar="N",
        help="candidates per requested document to re-rank with exact vectors; 0 for none (default: %(default)s)",
    ),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    started = time.perf_counter()
    options = options_of(args.options, INDEX_TYPES.find(args.type, ""))
    meta = build_index(
        args.vectors, args.out, args.type, width=args.width, rescore=args.rescore, options=options,
        overwrite=args.overwrite,
    )  # fmt: skip
    print(f"{args.out}: {meta.kind} index of {meta.num_docs} documents in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
