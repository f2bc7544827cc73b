"""The process group of a run: the device and the threads of this rank, joining and leaving.

The device is selected before anything is built. Every process starts with device 0 as its current device, on which
sharded tables and the first copy of the model would otherwise be allocated by all ranks of a host.
"""

import gc
import os
import socket
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import joblib
import torch
from deepspeed.accelerator import get_accelerator

from bigdssm import distributed
from bigdssm.errors import ConfigError, PeerError
from bigdssm.training.patches import apply_patches, undo_patches

COLLECTIVE_TIMEOUT_S = 1800
_environment_before: dict[str, str | None] = {}  # values of the variables that `init_process_group` has set


@dataclass(frozen=True)
class Placement:
    """The resources of a rank."""

    host: str
    boot: str  # equal for ranks on the same machine, in any container
    cores: tuple[int, ...]  # on which this process may run
    device: str | None  # the unique id of its device; None: the CPU


def init_process_group() -> None:
    """Select this rank's device, and join the launcher's process group, or create one of a single rank.

    All ranks must call it. Raises ConfigError: there are fewer devices than ranks, or the port is in use; PeerError:
    not all ranks have connected.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        _set_environment(**alone, MASTER_PORT=distributed.free_port())
    select_device()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # caused by DeepSpeed
    apply_patches()
    try:
        deepspeed.init_distributed(
            dist_backend=_backend(),
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            verbose=False,
        )
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"the master port at {where} is in use; pass a free one to the launcher (deepspeed --master_port, "
                "torchrun --master-port)"
            ) from None
        if distributed.is_collective_failure(error):
            reason = str(error).splitlines()[0]
            raise PeerError(f"not all {os.environ['WORLD_SIZE']} ranks connected at {where}: {reason}") from None
        raise
    finally:
        undo_patches()
    placements = distributed.all_gather_object(_placement())
    check_devices(placements)
    if "OMP_NUM_THREADS" not in os.environ:  # otherwise every rank would use every core
        torch.set_num_threads(num_threads(placements, distributed.rank(), joblib.cpu_count()))


def leave_process_group() -> None:
    """Destroy the process group, including DeepSpeed's state, so that this process may join or launch another.

    Its threads end when nothing refers to it. A thread that releases a tensor while the interpreter exits aborts the
    process; engines are therefore destroyed before.
    """
    if distributed.is_distributed():
        deepspeed.comm.destroy_process_group()
        gc.collect()  # destroyed engines, in reference cycles
    for name, value in _environment_before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _environment_before.clear()


def select_device() -> None:
    """Make this rank's device the current one of this thread: the only visible one, or that of its local rank.

    A scheduler that gives each task its own device makes only this one visible. DeepSpeed selects the device again, by
    LOCAL_RANK, which is therefore set to its index. Raises ConfigError: too few devices are visible.
    """
    if not on_device():
        return
    accelerator = get_accelerator()
    visible, local_rank = accelerator.device_count(), int(os.environ["LOCAL_RANK"])
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise ConfigError(
            f"LOCAL_RANK={local_rank} on {socket.gethostname()}: {visible} devices are visible, needs one per rank "
            f"of a host; start at most {visible} ranks per host, or make one device per rank visible"
        )
    _set_environment(LOCAL_RANK=str(index))
    accelerator.set_device(index)


def check_devices(placements: Sequence[Placement]) -> None:
    """Raise ConfigError if two ranks have the same device."""
    rank_of: dict[str, int] = {}
    for rank, placement in enumerate(placements):
        if placement.device is None:
            continue
        other = rank_of.setdefault(placement.device, rank)
        if other != rank:
            raise ConfigError(
                f"rank {other} and rank {rank} on {placement.host} have the same device {placement.device}, needs one "
                "for each rank; start fewer ranks per host, or make a device of its own visible to each"
            )


def num_threads(placements: Sequence[Placement], rank: int, cores: int) -> int:
    """Return the number of threads of a rank: an even share of `cores` among the ranks that run on them.

    The ranks of a machine are counted: not all launchers set their number. Ranks that a scheduler has bound to
    different cores do not share them.
    """
    ranks_on: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for placement in placements:
        ranks_on[placement.boot, placement.cores] += 1
    own = placements[rank]
    sharing = ranks_on[own.boot, own.cores]
    return max(1, min(cores, len(own.cores)) // sharing)


def device() -> torch.device:
    """Return this rank's device."""
    return torch.device(get_accelerator().current_device_name()) if on_device() else torch.device("cpu")


def on_device() -> bool:
    """Return whether ranks compute on accelerators."""
    return bool(get_accelerator().device_name() != "cpu")


def _placement() -> Placement:
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname()
    machine = boot.read_text().strip() if boot.exists() else host
    return Placement(host, machine, tuple(sorted(os.sched_getaffinity(0))), _device_id(machine))


def _device_id(machine: str) -> str | None:
    """Return the unique id of this rank's device, None on the CPU."""
    if not on_device():
        return None
    current = device()
    if current.type != "cuda":
        return f"{machine} {current}"
    return str(torch.cuda.get_device_properties(current).uuid)


def _set_environment(**variables: str) -> None:
    """Set environment variables until `leave_process_group`."""
    for name, value in variables.items():
        _environment_before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _backend() -> str:
    """Return a backend for CPU and device tensors: small decisions, such as a stop, are exchanged on the CPU."""
    if not on_device():
        return "gloo"
    return f"cpu:gloo,{get_accelerator().device_name()}:{get_accelerator().communication_backend_name()}"
