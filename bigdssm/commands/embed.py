"""Encode a dataset's catalogue with a model into a folder of document vectors.

    bigdssm embed --model MODEL --data DATASET --out VECTORS [--format fvecs parquet]
    bigdssm embed --model MODEL --data DATASET --out VECTORS --dtype int8
    torchrun --nproc-per-node 8 -m bigdssm.commands.embed --model MODEL --data DATASET --out VECTORS

VECTORS/vectors.npy is float32 [documents, D+1]: [alpha * w, beta], whose inner product with a query's [u, 1] is the
training score. --dtype float16 takes half of that, int8 about a fourth and binary, a sign a dimension, about a 32nd;
whatever reads vectors reads all of these. VECTORS/documents.arrow names the documents, VECTORS/meta.json the model and
the dataset.

A run that was ended goes on from its finished shards when it is started again, with any number of ranks; each of them
needs only the dataset and --out. --since EARLIER takes the vectors of documents that have not changed from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import ProgressBar, check_width, command
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import cut_encoders, tower_encoders
from bigdssm.retrieval.shards import ROWS_PER_SHARD, ShardWork
from bigdssm.retrieval.vector_files import FileFormat, check_formats, difference_from_model, write_card, write_file
from bigdssm.retrieval.vectors import Dtype, write_vectors


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--out", type=Path, required=True, help="folder for the vectors")
    parser.add_argument("--since", type=Path, metavar="EARLIER", help="vectors of the same model, may be --out")
    parser.add_argument("--width", type=int, help="cut vectors to so many numbers, as of a model of loss.widths")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="how vectors lie (%(default)s)")
    parser.add_argument("--format", nargs="+", choices=get_args(FileFormat), default=[], help="files to write too")
    parser.add_argument("--rows-per-shard", type=int, default=ROWS_PER_SHARD, help="documents a shard (%(default)s)")
    args = parser.parse_args(argv)
    check_formats(args.dtype, args.format)
    folder, dataset = load_model_folder(args.model), Dataset.open(args.data)
    dataset = folder.view(dataset)
    encoders, model = tower_encoders(folder.model, dataset), folder.config.model
    if args.width is not None:
        check_width("--width", args.width, model.dim)
        encoders = cut_encoders(encoders, args.width, model.score == "cosine")
    with ProgressBar() as progress:
        work = ShardWork.of_launcher(args.rows_per_shard, progress)
        whole = 0 if args.width in (None, model.dim) else model.dim + 1
        written = write_vectors(
            args.out,
            encoders,
            dataset,
            folder.checksum,
            work,
            args.since,
            whole=whole,
            score=model.score,
            dtype=args.dtype,
        )
    went_on = f", {written.found} shards were finished before" if written.found else ""
    print(f"rank {work.rank} of {work.world_size}: {written.encoded} encoded, {written.reused} unchanged{went_on}")
    if written.meta is None:
        return  # what follows is written by one rank, the one that was last
    print(f"{args.out}: {written.meta.num_docs} vectors of width {written.meta.width}, {args.dtype}")
    parity: dict[FileFormat, float] = {}
    for target in dict.fromkeys(["npy", *args.format]):
        path = write_file(args.out, target)
        parity[target] = difference_from_model(path, encoders)
        print(f"{path}: largest difference from the model's vectors {parity[target]:.1e}")
    write_card(args.out, folder.config.model.score, parity)


if __name__ == "__main__":
    sys.exit(main())
