"""Mine hard negatives: documents at positions [first, last) of each training query's ranking.

    bigdssm mine_negatives --model MODEL --data DATASET --out NEGATIVES.npy [--first 10] [--last 200]
    bigdssm mine_negatives --model MODEL --data DATASET --out NEGATIVES.npy --ranks 2 [--device cpu]

The file contains catalogue rows per query, padded with -1 (bigdssm/retrieval/hard_negatives.py). Known train positives
of the query are excluded, and with --margin also documents that score almost as high as its positive. --vectors reads
document vectors that bigdssm embed wrote with the same model. --pairs writes the texts of each query with its document
(label 1) and a sample of its negatives (label 0): columns query, document and label.
"""

import argparse
import math
from pathlib import Path

import torch

from bigdssm import distributed
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import DATA, OVERWRITE, at_least, check_file_to_write, command, option, refuse_options
from bigdssm.commands._ranks import DEVICE, RANKS, process_group, run_on_ranks
from bigdssm.config import MiningConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import ConfigError
from bigdssm.retrieval.embed import DocumentVectors, tower_encoders
from bigdssm.retrieval.mining import gather_hard_negatives, mine
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.text_pairs import write_text_pairs
from bigdssm.retrieval.vectors import read_vectors
from bigdssm.utils.device import find_device
from bigdssm.utils.log import ProgressBar


@command(
    option("--model", type=Path, required=True, help="model folder"),
    DATA,
    option("--out", type=Path, required=True, metavar="NPY", help="file for the negatives"),
    option("--first", type=int, default=10, help="first position, counted from 0 (default: %(default)s)"),
    option("--last", type=int, default=200, help="last position, exclusive (default: %(default)s)"),
    option(
        "--margin",
        type=float,
        help="drop documents whose score exceeds the positive's score minus MARGIN (default: keep all)",
    ),
    option(
        "--exact-up-to",
        type=int,
        default=MiningConfig.exact_up_to,
        metavar="DOCS",
        help="use an approximate index for larger catalogues (default: %(default)s)",
    ),
    option("--vectors", type=Path, metavar="DIR", help="document vectors (default: encode the catalogue)"),
    option("--pairs", type=Path, metavar="PARQUET", help="also write texts and labels, to train a cross-encoder"),
    option("--per-query", type=at_least(1), default=4, help="negatives per query of --pairs (default: %(default)s)"),
    DEVICE,
    RANKS,
    OVERWRITE,
)
def main(args: argparse.Namespace) -> int | None:
    """Run the command line."""
    for name, file in (("--out", args.out), ("--pairs", args.pairs)):
        check_file_to_write(name, file, "mine_negatives", overwrite=args.overwrite)
    if args.pairs is None:
        refuse_options(args, ["--per-query"], "without --pairs")
    if args.margin is not None and not math.isfinite(args.margin):
        raise ConfigError(f"--margin {args.margin}: needs a finite number")
    if args.exact_up_to < 0:
        raise ConfigError(f"--exact-up-to {args.exact_up_to}: needs at least 0")
    if not 0 <= args.first < args.last:
        raise ConfigError(f"--first {args.first} --last {args.last}: needs 0 <= first < last")
    if (code := run_on_ranks("mine_negatives", args)) is not None:
        return code
    with process_group(args.device):
        _mine(args, find_device(args.device))
    return None


def _mine(args: argparse.Namespace, device: torch.device) -> None:
    folder, dataset = load_model_folder(args.model, device), Dataset.open(args.data)
    dataset = folder.view(dataset.with_rules(EventRules.of(folder.config.data)))
    with ProgressBar() as progress:
        share, documents = Share(distributed.rank(), distributed.world_size(), progress=progress), None
        if args.vectors is not None:
            start, stop = share.of(dataset.catalogue.num_docs)
            vectors = read_vectors(args.vectors, folder.doc_checksum, dataset, start, stop, folder.index_width)
            documents = DocumentVectors(torch.from_numpy(vectors).to(device), start, dataset.catalogue.withdrawn)
        local = mine(
            tower_encoders(folder.model, dataset), dataset, first=args.first, last=args.last,
            margin=args.margin, exact_up_to=args.exact_up_to, documents=documents, share=share,
            exclude_seen=folder.config.data.exclude_seen,
            negatives=NegativeDocuments.of(dataset, folder.config.model.tables.id_dropout),
        )  # fmt: skip
        if not distributed.any_rank(bool((local["window"] >= 0).any())):
            within = "" if args.margin is None else f" and --margin {args.margin}"
            raise ConfigError(
                f"no query has a negative with --first {args.first} --last {args.last}{within} among "
                f"{dataset.catalogue.num_docs} documents without its known positives; choose a lower --first"
            )
        hard = gather_hard_negatives(args.out, local, dataset)
    if distributed.is_main():
        print(f"{args.out}: {len(hard)} queries, {hard.per_query():.1f} negatives per query")
        if args.pairs is not None:
            num_pairs = write_text_pairs(args.pairs, dataset, hard, args.per_query)
            print(f"{args.pairs}: {num_pairs} pairs of texts")


if __name__ == "__main__":
    raise SystemExit(main())
