"""Check the machines of a cluster before a first run: versions, GPUs, network and shared folder.

    deepspeed --hostfile hosts launch/check_cluster.py --folder /shared
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29400 launch/check_cluster.py

Prints the device, driver and threads of every rank, and the rate of an all-reduce: about the bandwidth of the slowest
link. Fails with one sentence if hosts have different versions, two ranks have one GPU, or the folder is not shared, has
no locks that other ranks see, or no atomic renames.
"""

import argparse
import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from bigdssm import distributed
from bigdssm.cli import command, option
from bigdssm.cluster.run_folder import RUNNING_FILE, is_locked, versions
from bigdssm.errors import ConfigError
from bigdssm.utils.atomic import write_json

BYTES, BYTES_ON_CPU, REPEATS = 256 << 20, 16 << 20, 5
REPLACEMENTS = 50  # of a file that all other ranks read meanwhile
CONTENT_FILE, CONTENT = "content.json", {"text": "x" * 100_000}


@dataclass(frozen=True)
class RankFacts:
    """A rank's machine, device and versions."""

    host: str
    device: str
    driver: str
    threads: int
    versions: dict[str, str]


@command(
    option("--folder", type=Path, metavar="DIR", help="folder for runs and data (default: no folder is checked)"),
    option("--local_rank", type=int, default=0, help=argparse.SUPPRESS),  # deepspeed passes it
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    from bigdssm.training.process_group import device, init_process_group, leave_process_group  # late: it takes seconds

    init_process_group()
    ranks = distributed.all_gather_object(facts_of(device()))
    distributed.raise_together(version_error(ranks))
    if args.folder is not None:
        check_folder(args.folder)
    rate = all_reduce_rate(device())
    if distributed.is_main():
        for rank, facts in enumerate(ranks):
            print(f"rank {rank}: {facts.host}, {facts.device}, driver {facts.driver}, {facts.threads} threads")
        print(f"versions on all ranks: {', '.join(f'{name} {number}' for name, number in ranks[0].versions.items())}")
        if args.folder is not None:
            print(f"{args.folder}: shared by all ranks, with locks and atomic renames")
        if rate is not None:
            print(f"all-reduce: {rate / 1e9:.2f} GB/s")
    leave_process_group()


def facts_of(device: torch.device) -> RankFacts:
    """Return the facts of this rank."""
    name, driver, of_rank = "CPU", "none", versions()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        with suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        nccl: tuple[int, ...] = torch.cuda.nccl.version()
        of_rank |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, nccl))}
    return RankFacts(socket.gethostname(), name, driver, torch.get_num_threads(), of_rank)


def version_error(ranks: Sequence[RankFacts]) -> ConfigError | None:
    """Return the error of the first rank whose versions differ from those of rank 0."""
    first = ranks[0]
    for rank, facts in enumerate(ranks):
        for name in sorted(first.versions.keys() | facts.versions.keys()):
            ours, theirs = first.versions.get(name, "none"), facts.versions.get(name, "none")
            if ours != theirs:
                return ConfigError(
                    f"{name} is {theirs} on {facts.host} (rank {rank}) and {ours} on {first.host} (rank 0), needs "
                    "equal versions; install the same environment on all hosts"
                )
    return None


def check_folder(folder: Path) -> None:
    """Check that the ranks share a folder. Raises ConfigError on every rank."""
    trial = folder / distributed.broadcast_object(f"check-cluster-{os.getpid()}-{time.time_ns()}")
    with ExitStack() as held:
        failure = None
        if distributed.is_main():
            try:
                _write_trial(trial, held)
            except OSError as error:
                failure = f"{error.strerror or error}, needs a folder in which rank 0 can write and lock files"
        _raise_together(failure, folder)
        if not (trial / CONTENT_FILE).is_file():
            failure = "has no file that rank 0 has written there, needs one folder on all hosts; mount it"
        elif not distributed.is_main() and not is_locked(trial):
            failure = "does not show the lock of rank 0, needs POSIX record locks (NFS 4; Lustre mounted with flock)"
        _raise_together(failure, folder)
        _raise_together(_replace_and_read(trial / CONTENT_FILE), folder)
        distributed.barrier()  # before rank 0 removes the files


def _write_trial(trial: Path, held: ExitStack) -> None:
    """Write a folder with a file, and lock it; both until `held` ends."""
    trial.mkdir(parents=True)
    held.callback(shutil.rmtree, trial)
    write_json(trial / CONTENT_FILE, CONTENT)
    fcntl.lockf(held.enter_context((trial / RUNNING_FILE).open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _raise_together(failure: str | None, folder: Path) -> None:
    where = f"--folder {folder} on {socket.gethostname()} (rank {distributed.rank()})"
    distributed.raise_together(None if failure is None else ConfigError(f"{where}: {failure}"))


def _replace_and_read(file: Path) -> str | None:
    """Replace a file on rank 0 while all other ranks read it; return the failure of an incomplete version."""
    for _ in range(REPLACEMENTS):
        try:
            if distributed.is_main():
                write_json(file, CONTENT)
            elif json.loads(file.read_text(encoding="utf-8")) != CONTENT:
                return "shows another file than rank 0 has written, needs atomic renames"
        except (OSError, ValueError) as error:
            return f"shows an incomplete file ({error}), needs atomic renames"
    return None


def all_reduce_rate(device: torch.device) -> float | None:
    """Return bytes per second that each rank sends in an all-reduce; None for a single rank."""
    world_size = distributed.world_size()
    if world_size == 1:
        return None
    num_bytes = BYTES_ON_CPU if device.type == "cpu" else BYTES
    values = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(1 + REPEATS):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(values)
        float(values[0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    sent = 2 * (world_size - 1) / world_size * num_bytes
    return sent / sorted(seconds[1:])[REPEATS // 2]


if __name__ == "__main__":
    raise SystemExit(main())
