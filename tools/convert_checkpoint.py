"""Turn a stage's weights into a model folder: config, schema, tokenizer and safetensors, all that serving needs.

    python tools/convert_checkpoint.py --run RUN/pretrain [--checkpoint best|latest|step-00000100] --out MODEL

best is the stage's best validation; latest and step-… are put together from the shares of all ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bigdssm.cli import run_main
from bigdssm.export.convert import convert_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="STAGE", help="stage folder, such as RUN/sft")
    parser.add_argument("--checkpoint", default="best", help="best, latest or step-… (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model folder to write")
    args = parser.parse_args()
    taken = convert_stage(args.run, args.checkpoint, args.out)
    print(f"{args.out}: the model of {args.run}, {taken}")


if __name__ == "__main__":
    sys.exit(run_main(main))
