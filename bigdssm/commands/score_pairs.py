"""Score each train query's own document and those mined for it, by a judge that knows better.

    bigdssm score_pairs --data DATASET --mined NPY --out JUDGED.npy --cross-encoder FOLDER
    bigdssm score_pairs --data DATASET --mined NPY --out JUDGED.npy --model MODEL [MODEL …] --pretrained FOLDER --bm25
    torchrun --nproc-per-node 8 -m bigdssm.commands.score_pairs …       # the queries are shared out over the ranks

NPY is a file of bigdssm mine_negatives; JUDGED.npy is the same with the judge's scores, for sft.negatives.mining.file
with sft.distillation or mining.teacher_margin. Judges are model folders, whatever scores in them, cross-encoders of
sentence-transformers, whose scores are their logits, Hugging Face text encoders as they are, whose scores are cosines,
and BM25. Of several it is the mean of their scores, standardised within each query. All but model folders read the
dataset's texts: as its tokenizer gives them, cut to max_tokens.

A run that was ended goes on from its finished shards when it is started again, with any number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm.checkpoints.checkpoint import folder_checksums
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import ProgressBar, at_least, check_file_to_write, command
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.evaluation.teachers import (
    Bm25Teacher,
    CrossEncoderTeacher,
    PairTeacher,
    model_teacher,
    pretrained_teacher,
    score_pairs,
)
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.shards import ShardWork
from bigdssm.retrieval.texts import Texts
from bigdssm.utils.hashing import file_checksum, json_checksum
from bigdssm.utils.log import Progress

ROWS_PER_SHARD = 1024


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--mined", type=Path, required=True, metavar="NPY", help="file of mined negatives")
    parser.add_argument("--out", type=Path, required=True, metavar="NPY", help="file for the same with scores")
    parser.add_argument("--model", type=Path, nargs="+", default=[], metavar="FOLDER", help="model folders that judge")
    parser.add_argument(
        "--cross-encoder", type=Path, nargs="+", default=[], metavar="FOLDER", help="cross-encoders that judge"
    )
    parser.add_argument(
        "--pretrained", type=Path, nargs="+", default=[], metavar="FOLDER", help="text encoders that judge as they are"
    )
    parser.add_argument("--bm25", action="store_true", help="BM25 judges")
    parser.add_argument(
        "--rows-per-shard", type=at_least(1), default=ROWS_PER_SHARD, help="queries a shard (%(default)s)"
    )
    args = parser.parse_args(argv)
    check_file_to_write("--out", args.out)
    if not (args.model or args.cross_encoder or args.pretrained or args.bm25):
        raise ConfigError("nobody judges: give --model, --cross-encoder, --pretrained, --bm25, or several of them")
    dataset, mined = Dataset.open(args.data), HardNegatives.open(args.mined)
    mined.check_against(dataset)
    with ProgressBar() as progress:
        judges = _judges(args, dataset, progress)
        names = [file_checksum(args.mined), *judges]
        work = ShardWork.of_launcher(args.rows_per_shard, progress)
        judged = score_pairs(args.out, mined, dataset, list(judges.values()), names, work)
    if judged is not None:
        print(f"{args.out}: {len(judged)} queries, {judged.per_query():.1f} documents each, scored by {len(judges)}")


def _judges(args: argparse.Namespace, dataset: Dataset, progress: Progress) -> dict[str, PairTeacher]:
    """Return the judges by what tells them from others."""
    judges: dict[str, PairTeacher] = {}
    for path in args.model:
        folder = load_model_folder(path)
        judges[folder.checksum] = model_teacher(folder, dataset)
    if args.cross_encoder or args.pretrained or args.bm25:
        texts = Texts(dataset)
    for path in args.cross_encoder:
        judges[json_checksum(folder_checksums(path))] = CrossEncoderTeacher(path, texts)
    for path in args.pretrained:
        judges[json_checksum(folder_checksums(path))] = pretrained_teacher(path, dataset, texts)
    if args.bm25:
        judges["BM25"] = Bm25Teacher(dataset, texts, progress)
    return judges


if __name__ == "__main__":
    sys.exit(main())
