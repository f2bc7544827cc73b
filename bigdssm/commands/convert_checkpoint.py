"""Turn trained weights into a folder that serves, and compare it with the trainer's model.

    bigdssm convert_checkpoint --run RUN/pretrain [--checkpoint best|latest|step-00000100] --out MODEL
    bigdssm convert_checkpoint --model MODEL --format sentence-transformers --out FOLDER
    bigdssm convert_checkpoint --model MODEL --out FOLDER --format onnx int8=false

best is the stage's best validation; latest and step-… are put together from the shares of all ranks, whatever the ZeRO
stage. The formats, each with a model card (README.md):

    model                  config, schema, tokenizer, safetensors: what the other tools take as --model
    sentence-transformers  SentenceTransformer(FOLDER); towers of one text
    hf                     AutoModel, AutoTokenizer and the projection of each tower; towers of one text
    onnx                   query.onnx, doc.onnx and query.int8.onnx for onnxruntime; any towers

KEY=VALUE sets an option of the format (docs/config_keys.md). The last line is how far vectors of a probe batch are from
the trainer's; more than 1e-5 is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from bigdssm.cli import command
from bigdssm.config.loading import options_of
from bigdssm.errors import ConfigError
from bigdssm.export.convert import BEST, export, folder_source, stage_source
from bigdssm.export.formats import EXPORT_FORMATS, export_format


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="STAGE", help="stage folder, such as RUN/sft")
    source.add_argument("--model", type=Path, help="model folder")
    parser.add_argument("--checkpoint", help=f"of --run: best, latest or step-… ({BEST})")
    parser.add_argument("--format", default="model", help=f"{', '.join(EXPORT_FORMATS.names())} (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the format")
    args = parser.parse_intermixed_args(argv)
    if args.model is not None and args.checkpoint is not None:
        raise ConfigError("--checkpoint chooses among a stage's weights; a model folder holds only one")
    kind = export_format(args.format, options_of(args.options))
    logging.disable_progress_bar()
    taken = stage_source(args.run, args.checkpoint or BEST) if args.run else folder_source(args.model)
    parity = export(taken, args.out, kind)
    print(f"{args.out}: {args.format} of {args.run or args.model}, {taken.name}")
    print(f"largest difference from the trainer's vectors: {parity}")


if __name__ == "__main__":
    sys.exit(main())
