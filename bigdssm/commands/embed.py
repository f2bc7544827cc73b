"""Encode the catalogue of a dataset into a folder of document vectors.

    bigdssm embed --model MODEL --data DATASET --out VECTORS [--format fvecs parquet]
    bigdssm embed --model MODEL --data DATASET --out VECTORS --dtype int8
    torchrun --nproc-per-node 8 -m bigdssm.commands.embed --model MODEL --data DATASET --out VECTORS

VECTORS/vectors.npy is float32 [documents, D+1]: [alpha * w, beta], whose inner product with a query's [u, 1] is the
training score. --dtype float16 needs half the space, int8 about a quarter, binary (one sign bit per dimension) about
1/32. All commands accept vectors of every type. VECTORS/documents.arrow lists the documents, VECTORS/meta.json the
model and dataset.

An interrupted run continues from its finished shards when restarted, with any number of ranks; every rank needs the
model, the dataset and --out. --since EARLIER reuses the vectors of unchanged documents; width, dtype and formats are
those of EARLIER unless given.
"""

import argparse
from pathlib import Path
from typing import get_args

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import DATA, OVERWRITE, command, option
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import check_width, tower_encoders, truncate_encoders
from bigdssm.retrieval.shards import ROWS_PER_SHARD, Share
from bigdssm.retrieval.vectors import (
    Dtype,
    FileFormat,
    check_formats,
    difference_from_model,
    formats_in,
    read_meta,
    write_card,
    write_file,
    write_vectors,
)
from bigdssm.utils.log import ProgressBar


@command(
    option("--model", type=Path, required=True, help="model folder"),
    DATA,
    option("--out", type=Path, required=True, help="folder for the vectors"),
    option(
        "--since",
        type=Path,
        metavar="EARLIER",
        help="folder with vectors of the same model, reused for unchanged documents; its options are the defaults (may "
        "be --out; default: none)",
    ),
    option("--width", type=int, help="number of leading dimensions, for loss.widths (default: all)"),
    option("--dtype", choices=get_args(Dtype), help="storage type of vectors (default: float32)"),
    option(
        "--format",
        nargs="+",
        choices=get_args(FileFormat),
        help="additional file formats; npy: no other (default: none)",
    ),
    option("--rows-per-shard", type=int, default=ROWS_PER_SHARD, help="documents per shard (default: %(default)s)"),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    earlier = None if args.since is None else read_meta(args.since)
    dtype: Dtype = args.dtype or (earlier.dtype if earlier else "float32")
    formats = args.format or ([] if earlier is None else formats_in(args.since))
    check_formats(dtype, formats)
    if args.width is None and earlier is not None and earlier.whole:
        args.width = earlier.width - earlier.has_beta
    folder, dataset = load_model_folder(args.model), Dataset.open(args.data)
    dataset = folder.view(dataset)
    encoders, model = tower_encoders(folder.model, dataset), folder.config.model
    if args.width is not None:
        check_width("--width", args.width, model.dim)
        encoders = truncate_encoders(encoders, args.width, model.score == "cosine")
    parity: dict[FileFormat, float] = {}

    def write_files(temporary: Path) -> None:
        for target in dict.fromkeys(["npy", *formats]):
            parity[target] = difference_from_model(write_file(temporary, target), encoders)
        write_card(temporary, model.score, parity)

    with ProgressBar() as progress:
        work = Share.from_launcher(args.rows_per_shard, progress)
        full_width = 0 if args.width in (None, model.dim) else model.dim + encoders.has_beta
        written = write_vectors(
            args.out,
            encoders,
            dataset,
            folder.doc_checksum,
            work,
            args.since,
            full_width=full_width,
            score=model.score,
            dtype=dtype,
            complete=write_files,
            overwrite=args.overwrite,
        )
    resumed = f", {written.resumed_shards} shards were already finished" if written.resumed_shards else ""
    print(f"rank {work.rank} of {work.world_size}: {written.encoded} encoded, {written.reused} unchanged{resumed}")
    if written.meta is not None:  # the last rank to finish writes the other files
        print(f"{args.out}: {written.meta.num_docs} vectors of width {written.meta.width}, {dtype}")
        for target, difference in parity.items():
            print(f"{args.out}/vectors.{target}: largest difference from the model's vectors {difference:.1e}")


if __name__ == "__main__":
    raise SystemExit(main())
