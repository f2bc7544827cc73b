"""Encode documents and training queries with a teacher, for distillation in fine-tuning.

    bigdssm embed_teacher --data DATASET --out FOLDER --model MODEL
    bigdssm embed_teacher --data DATASET --out FOLDER --pretrained HF_FOLDER
    torchrun --nproc-per-node 8 -m bigdssm.commands.embed_teacher …     # distributes the rows over the ranks

Use FOLDER in sft.distillation={name: batch_kl, teacher: FOLDER}. The teacher's scores are inner products of vectors:
those of a bigdssm model, or the cosines of an unchanged Hugging Face text encoder, which reads the dataset's texts as
decoded by its tokenizer, truncated to max_tokens. An interrupted run continues from its finished shards.
"""

import argparse
from pathlib import Path

from bigdssm.checkpoints.checkpoint import folder_checksums
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cli import DATA, RULES, at_least, command, one_of, open_with_rules, option
from bigdssm.commands._ranks import DEVICE
from bigdssm.errors import ConfigError
from bigdssm.evaluation.pretrained import PretrainedEncoder, text_encoders
from bigdssm.models.precision import PRECISION_HELP, PRECISIONS
from bigdssm.retrieval.embed import encode_in, tower_encoders
from bigdssm.retrieval.reranking import Texts
from bigdssm.retrieval.shards import ROWS_PER_SHARD, Share
from bigdssm.retrieval.teacher_vectors import write_teacher_vectors
from bigdssm.utils.device import find_device
from bigdssm.utils.hashing import json_checksum
from bigdssm.utils.log import ProgressBar


@command(
    DATA,
    RULES,
    option("--out", type=Path, required=True, metavar="FOLDER", help="folder for the vectors"),
    one_of(
        option("--model", type=Path, metavar="FOLDER", help="model folder of the teacher"),
        option("--pretrained", type=Path, metavar="FOLDER", help="unchanged Hugging Face text encoder"),
    ),
    option("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP),
    DEVICE,
    option("--rows-per-shard", type=at_least(1), default=ROWS_PER_SHARD, help="rows per shard (default: %(default)s)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out} exists; choose another folder, or remove it")
    dataset = open_with_rules(args.data, args.config)
    if args.pretrained is not None:
        pretrained = PretrainedEncoder(args.pretrained, precision=args.precision, device=find_device(args.device))
        encoders = text_encoders(pretrained, Texts.of(dataset))
        name = json_checksum([folder_checksums(args.pretrained), pretrained.precision])
    else:
        folder = load_model_folder(args.model, find_device(args.device))
        view = folder.view(dataset)
        precision = encode_in(folder.model, args.precision)
        encoders, name = tower_encoders(folder.model, view), json_checksum([folder.checksum, precision])
    with ProgressBar() as progress:
        work = Share.from_launcher(args.rows_per_shard, progress)
        vectors = write_teacher_vectors(args.out, encoders, dataset, name, work)
    if vectors is not None:
        documents, width = vectors.documents.shape
        print(f"{args.out}: {documents} documents and {len(vectors.keys)} queries of width {width}")


if __name__ == "__main__":
    raise SystemExit(main())
