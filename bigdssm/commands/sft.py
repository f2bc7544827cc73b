"""Fine-tune (SFT) the pretrained model of a config, on ranks as `bigdssm pretrain`.

bigdssm sft --config my.yaml [--ranks N] [key=value …]
deepspeed --module bigdssm.commands.sft --config my.yaml [key=value …]
torchrun --nproc-per-node 2 -m bigdssm.commands.sft --config my.yaml [key=value …]
"""

from collections.abc import Sequence

from bigdssm.commands._stage import run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run("sft", __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
