"""Pretrain the model of a config on the GPUs or cores of this machine, or as a rank of a launcher.

bigdssm pretrain --config my.yaml [--ranks N] [key=value …]
deepspeed --module bigdssm.commands.pretrain --config my.yaml [key=value …]
torchrun --nproc-per-node 2 -m bigdssm.commands.pretrain --config my.yaml [key=value …]
"""

from collections.abc import Sequence

from bigdssm.commands._stage import run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run("pretrain", __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
