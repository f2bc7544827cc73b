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

import time
from collections.abc import Sequence
from pathlib import Path

from bigdssm.cli import add_overwrite, command, command_parser
from bigdssm.config.loading import options_of
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.index_types import INDEX_TYPES


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("--vectors", type=Path, required=True, help="folder written by bigdssm embed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the index")
    parser.add_argument(
        "--type", default="flat", help=f"index type: {', '.join(INDEX_TYPES.names())} (default: %(default)s)"
    )
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the index type")
    parser.add_argument("--width", type=int, help="number of leading dimensions to index (default: all)")
    parser.add_argument(
        "--rescore", type=int, default=0, metavar="N",
        help="candidates per requested document to re-rank with exact vectors; 0 for none (default: %(default)s)",
    )  # fmt: skip
    add_overwrite(parser)
    args = parser.parse_intermixed_args(argv)
    started = time.perf_counter()
    options = options_of(args.options, INDEX_TYPES.find(args.type, ""))
    meta = build_index(
        args.vectors, args.out, args.type, width=args.width, rescore=args.rescore, options=options,
        overwrite=args.overwrite,
    )  # fmt: skip
    print(f"{args.out}: {meta.kind} index of {meta.num_docs} documents in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
