"""A rank with a planted fault: python -m tests.distributed.watched KIND VICTIM RANK WORLD_SIZE PORT."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bigdssm import distributed
from bigdssm.cli import run_main
from bigdssm.cluster import watchdog as module
from bigdssm.cluster.launcher import LauncherMonitor
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.errors import PeerError

TIMEOUT_S = 3.0
NUM_STEPS, MISFORTUNE_AT = 60, 10


def main() -> None:
    kind, victim, rank, world_size, port = sys.argv[1], *map(int, sys.argv[2:6])
    if "apart" in kind:  # as if every rank had a machine of its own
        module._machine = lambda: f"machine of {rank}"
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    print("started", flush=True)
    with Watchdog(TIMEOUT_S, LauncherMonitor(), Path("no such file")) as watchdog:
        for step in range(NUM_STEPS):
            watchdog.record_progress(f"step {step}")
            if step == MISFORTUNE_AT and rank == victim:
                meet(kind)
            if not kind.startswith("idle"):
                distributed.all_reduce(torch.ones(2))
            time.sleep(0.05)
    dist.destroy_process_group()


def meet(kind: str) -> None:
    if "kill" in kind:
        os.kill(os.getpid(), signal.SIGKILL)
    elif "stop" in kind:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "raise":
        raise ValueError("a row\nwithout end")
    elif kind == "late":
        time.sleep(TIMEOUT_S - 1)


if __name__ == "__main__":
    code = run_main(main)
    sys.stderr.flush()
    if code == PeerError.exit_code:
        os._exit(code)
    sys.exit(code)
