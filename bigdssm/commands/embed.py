"""Encode the catalogue of a dataset into a folder of document vectors.

    bigdssm embed --model MODEL --data DATASET --out VECTORS [--format fvecs parquet]
    bigdssm embed --model MODEL --data DATASET --out VECTORS --dtype int8
    bigdssm embed --model MODEL --data DATASET --out VECTORS --ranks 8 [--device cpu]
    torchrun --nnodes 2 --nproc-per-node 8 … -m bigdssm.commands.embed --model MODEL --data DATASET --out VECTORS

VECTORS/vectors.npy is float32 [documents, D+1]: [alpha * w, beta], whose inner product with a query's [u, 1] is the
training score. --dtype float16 needs half the space, int8 about a quarter, binary (one sign bit per dimension) about
1/32. All commands accept vectors of every type. VECTORS/documents.arrow lists the documents, VECTORS/meta.json the
model and dataset.

An interrupted run continues from its finished shards when restarted, with any number of ranks; every rank needs the
model, the dataset and --out. --since EARLIER reuses the vectors of unchanged documents; width, dtype and formats are
those of EARLIER unless given.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import DATA, OVERWRITE, command, option
from bigdssm.commands._ranks import DEVICE, RANKS, run_on_ranks
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import check_width, tower_encoders, truncate_encoders
from bigdssm.retrieval.shards import ROWS_PER_SHARD, Share
from bigdssm.retrieval.vectors import (
    Dtype,
    FileFormat,
    VectorsReport,
    check_formats,
    difference_from_model,
    formats_in,
    read_meta,
    write_card,
    write_file,
    write_vectors,
)
from bigdssm.utils.device import find_device
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
    DEVICE,
    RANKS,
    OVERWRITE,
)
def main(args: argparse.Namespace) -> int | None:
    """Run the command line."""
    if (code := run_on_ranks("embed", args)) is not None:
        return code
    with ProgressBar() as progress:
        work = Share.from_launcher(args.rows_per_shard, progress)
        written, parity = embed(
            args.model, args.data, args.out, work, since=args.since, width=args.width, dtype=args.dtype,
            formats=args.format, overwrite=args.overwrite, device=find_device(args.device),
        )  # fmt: skip
    resumed = f", {written.resumed_shards} shards were already finished" if written.resumed_shards else ""
    print(f"rank {work.rank} of {work.world_size}: {written.encoded} encoded, {written.reused} unchanged{resumed}")
    if written.meta is not None:  # the last rank to finish writes the other files
        print(f"{args.out}: {written.meta.num_docs} vectors of width {written.meta.width}, {written.meta.dtype}")
        for target, difference in parity.items():
            print(f"{args.out}/vectors.{target}: largest difference from the model's vectors {difference:.1e}")
    return None


def embed(
    model_dir: Path, data: str, out: Path, work: Share, *, since: Path | None = None, width: int | None = None,
    dtype: Dtype | None = None, formats: Sequence[FileFormat] | None = None, overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[VectorsReport, dict[FileFormat, float]]:  # fmt: skip
    """Write a vectors folder; return the report, and the largest difference from the model's vectors by format."""
    earlier = None if since is None else read_meta(since)
    dtype = dtype or (earlier.dtype if earlier else "float32")
    if formats is None:
        formats = [] if since is None else formats_in(since)
    check_formats(dtype, formats)
    if width is None and earlier is not None and earlier.whole:
        width = earlier.width - earlier.has_beta
    folder = load_model_folder(model_dir, device)
    dataset, model = folder.view(Dataset.open(data)), folder.config.model
    encoders = tower_encoders(folder.model, dataset)
    if width is not None:
        check_width("--width", width, model.dim)
        encoders = truncate_encoders(encoders, width, model.score == "cosine")
    parity: dict[FileFormat, float] = {}

    def write_files(temporary: Path) -> None:
        for target in dict.fromkeys(["npy", *formats]):
            parity[target] = difference_from_model(write_file(temporary, target), encoders)
        write_card(temporary, model.score, parity)

    full_width = 0 if width in (None, model.dim) else model.dim + encoders.has_beta
    report = write_vectors(
        out, encoders, dataset, folder.doc_checksum, work, since, full_width=full_width, score=model.score,
        dtype=dtype, complete=write_files, overwrite=overwrite,
    )  # fmt: skip
    return report, parity


if __name__ == "__main__":
    raise SystemExit(main())
