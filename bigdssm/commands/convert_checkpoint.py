"""Export trained weights as a model folder, and verify the exported vectors against the trainer's.

    bigdssm convert_checkpoint --run RUN/pretrain [--checkpoint best|latest|step-00000100] --out MODEL
    bigdssm convert_checkpoint --model MODEL --format sentence-transformers --out FOLDER
    bigdssm convert_checkpoint --model MODEL --out FOLDER --format onnx int8=false

best is the checkpoint with the best validation; latest and step-… are assembled from the shards of all ranks, for any
ZeRO stage. Every format includes a model card (README.md):

    model                  config, schema, tokenizer, safetensors: the --model of the other commands
    sentence-transformers  SentenceTransformer(FOLDER), and AutoModel of the encoder in it; towers with a single text
    onnx                   query.onnx, doc.onnx and query.int8.onnx for onnxruntime; any towers

KEY=VALUE sets an option of the format (docs/config_keys.md). The last line of the output is the largest difference
between exported and original vectors of a probe batch; more than 1e-5 is an error.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from bigdssm.cli import OVERWRITE, command, component_option, one_of, option
from bigdssm.config.loading import options_of
from bigdssm.errors import ConfigError
from bigdssm.export.convert import BEST, export, folder_source, stage_source
from bigdssm.export.formats import EXPORT_FORMATS


@command(
    one_of(
        option("--run", type=Path, metavar="STAGE", help="stage folder, such as RUN/sft"),
        option("--model", type=Path, help="model folder"),
    ),
    option("--checkpoint", help=f"checkpoint of --run: best, latest or step-… (default: {BEST})"),
    component_option("--format", "export format", EXPORT_FORMATS, "model"),
    option("--out", type=Path, required=True, metavar="FOLDER", help="folder to write"),
    option("options", nargs="*", metavar="KEY=VALUE", help="options of the format"),
    OVERWRITE,
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if args.model is not None and args.checkpoint is not None:
        raise ConfigError("--checkpoint needs --run: a model folder has only one checkpoint; omit it")
    kind = EXPORT_FORMATS.make(args.format, options_of(args.options, EXPORT_FORMATS.find(args.format, "")))
    logging.disable_progress_bar()
    source_weights = stage_source(args.run, args.checkpoint or BEST) if args.run else folder_source(args.model)
    parity = export(source_weights, args.out, kind, overwrite=args.overwrite)
    print(f"{args.out}: {args.format} of {args.run or args.model}, {source_weights.name}")
    print(f"largest difference from the trainer's vectors: {parity}")


if __name__ == "__main__":
    raise SystemExit(main())
