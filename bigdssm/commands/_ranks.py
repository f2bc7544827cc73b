"""Devices and ranks of commands that encode rows: `--device`, `--ranks`, and the processes that share the rows."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bigdssm.cli import at_least, option
from bigdssm.cluster.launcher import LauncherMonitor, check_launch, is_rank, rank_and_world_size, run_ranks, share_cores
from bigdssm.cluster.signals import StopRequest
from bigdssm.errors import ConfigError
from bigdssm.utils.device import find_device, num_gpus

DEVICES_HELP = "auto (a GPU if there is one), cpu, cuda or cuda:INDEX (default: %(default)s)"
DEVICE = option("--device", default="auto", help=f"device of the model: {DEVICES_HELP}")
QUERY_DEVICE = option("--device", default="cpu", help=f"device of the query tower: {DEVICES_HELP}")
RANKS = option(
    "--ranks",
    type=at_least(1),
    metavar="N",
    help="processes that share the rows (default: one per GPU, at least one); under a launcher, its number of ranks",
)


def run_on_ranks(command: str, args: argparse.Namespace) -> int | None:
    """Run a command on several ranks of this machine, and return its exit code; None: this process computes.

    Raises ConfigError: another number of ranks than the launcher's, or one GPU for several ranks.
    """
    if is_rank():
        _, world_size = rank_and_world_size()
        if args.ranks not in (None, world_size):
            raise ConfigError(f"--ranks {args.ranks}: the launcher has started {world_size}; omit --ranks")
        return None
    gpus = 0 if find_device(args.device).type == "cpu" else num_gpus()
    is_one_device = ":" in args.device
    ranks = args.ranks or max(1, 1 if is_one_device else gpus)
    if ranks == 1:
        return None
    if is_one_device or ranks > gpus > 0:
        raise ConfigError(
            f"--ranks {ranks} --device {args.device}: needs a GPU for each rank, this machine has {gpus}; use --device "
            "cuda with fewer ranks, or --device cpu"
        )
    share_cores(ranks)
    line = [sys.executable, "-m", "bigdssm.commands", command, *args.command_line]
    return run_ranks(line, ranks, StopRequest(), LauncherMonitor())


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """A context with the process group of several ranks, if a launcher has started them."""
    if check_launch() == 1:
        yield
        return
    from bigdssm.training.process_group import init_process_group, leave_process_group  # late: it takes seconds

    if find_device(device).type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # collectives of the host
    init_process_group()
    yield
    leave_process_group()
