"""Score the positive and the hard negatives of every training query, using a teacher.

    bigdssm score_pairs --data DATASET --mined NPY --out SCORED.npy --cross-encoder FOLDER
    bigdssm score_pairs --data DATASET --mined NPY --out SCORED.npy --model MODEL [MODEL …] --pretrained FOLDER --bm25
    torchrun --nproc-per-node 8 -m bigdssm.commands.score_pairs …       # distributes the queries over the ranks

NPY is a file of bigdssm mine_negatives; SCORED.npy adds teacher scores, for sft.negatives.mining.file with
sft.distillation or mining.teacher_margin. Teachers are bigdssm model folders, cross-encoders
of sentence-transformers (logits), unchanged Hugging Face text encoders (cosines), and BM25. The scores of several
teachers are averaged after standardization per query. All teachers except model folders read the dataset's texts as
decoded by its tokenizer, truncated to max_tokens.

The rules of --config are those of the run that reads the file, and of the one that mined NPY.

An interrupted run continues from its finished shards when restarted, with any number of ranks.
"""

import argparse
from pathlib import Path

from bigdssm.checkpoints.checkpoint import folder_checksums
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import DATA, OVERWRITE, RULES, at_least, check_file_to_write, command, open_with_rules, option
from bigdssm.commands._ranks import DEVICE
from bigdssm.errors import ConfigError
from bigdssm.evaluation.pretrained import PretrainedEncoder, text_encoders
from bigdssm.evaluation.teachers import (
    Bm25Teacher,
    PairTeacher,
    VectorTeacher,
    cross_encoder_teacher,
    model_teacher,
    score_pairs,
)
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.reranking import Texts
from bigdssm.retrieval.shards import Share
from bigdssm.utils.device import find_device
from bigdssm.utils.hashing import file_checksum, json_checksum
from bigdssm.utils.log import ProgressBar


@command(
    DATA,
    RULES,
    option("--mined", type=Path, required=True, metavar="NPY", help="file of hard negatives"),
    option("--out", type=Path, required=True, metavar="NPY", help="file for the negatives with scores"),
    option(
        "--model", type=Path, nargs="+", default=[], metavar="FOLDER", help="model folders as teachers (default: none)"
    ),
    option(
        "--cross-encoder",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="cross-encoders as teachers (default: none)",
    ),
    option(
        "--pretrained",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="unchanged Hugging Face text encoders as teachers (default: none)",
    ),
    option("--bm25", action="store_true", help="BM25 as a teacher"),
    option("--rows-per-shard", type=at_least(1), default=1024, help="queries per shard (default: %(default)s)"),
    DEVICE,
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    check_file_to_write("--out", args.out, "score_pairs", overwrite=args.overwrite)
    if not (args.model or args.cross_encoder or args.pretrained or args.bm25):
        raise ConfigError("no teacher: needs at least one of --model, --cross-encoder, --pretrained and --bm25")
    dataset, hard = open_with_rules(args.data, args.config), HardNegatives.open(args.mined)
    hard.check_against(dataset)
    with ProgressBar() as progress:
        device = find_device(args.device)
        teachers: dict[str, PairTeacher] = {}  # by kind and checksum
        for path in args.model:
            folder = load_model_folder(path, device)
            teachers[folder.checksum] = model_teacher(folder, dataset)
        if args.cross_encoder or args.pretrained or args.bm25:
            texts = Texts.of(dataset)
        for path in args.cross_encoder:
            teachers[f"cross-encoder {json_checksum(folder_checksums(path))}"] = cross_encoder_teacher(path, texts)
        for path in args.pretrained:
            encoders = text_encoders(PretrainedEncoder(path, device=device), texts)
            name = f"encoder {json_checksum(folder_checksums(path))}"
            teachers[name] = VectorTeacher(encoders, dataset.catalogue.num_docs)
        if args.bm25:
            teachers["BM25"] = Bm25Teacher(dataset, texts, progress)
        names = [file_checksum(args.mined), *teachers]
        work = Share.from_launcher(args.rows_per_shard, progress)
        scored = score_pairs(args.out, hard, dataset, list(teachers.values()), names, work)
    if scored is not None:
        per_query = f"{scored.per_query():.1f} documents per query"
        print(f"{args.out}: {len(scored)} queries, {per_query}, {len(teachers)} teachers")


if __name__ == "__main__":
    raise SystemExit(main())
