"""Run a picklable function on N gloo ranks of this machine, and return the results of all.

    results = run_ranks(function, world_size=3, args=(…))     # function(rank, world_size, *args)

`Pool` keeps the ranks alive between calls, which matters where a test makes many small ones.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests import forks

LATE_S = 5.0  # time for other ranks to fail after the first: ranks that raised need not be restarted


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time; the message has its traceback."""


class Pool:
    """`world_size` processes with a process group that run functions; a context manager."""

    def __init__(self, world_size: int, *, environment: dict[str, str] | None = None) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        # libraries read the environment when they are imported: without a change of it they are imported already
        context = mp.get_context("spawn") if environment else forks.context
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(world_size)]
        extra = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
        saved = {key: os.environ.get(key) for key in extra}
        os.environ.update(extra)  # libraries read it when the child starts
        try:
            rendezvous = Path(self._folder.name) / "rendezvous"
            self._ranks = [
                context.Process(
                    target=_serve,
                    args=(rank, world_size, str(rendezvous), self._tasks[rank], self._results),
                    daemon=True,
                )
                for rank in range(world_size)
            ]
            for process in self._ranks:
                process.start()
        finally:
            for key, value in saved.items():
                os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Return function(rank, world_size, *args) of every rank, in rank order. Raises: RankFailed."""
        for tasks in self._tasks:
            tasks.put((function, args))
        results: dict[int, Any] = {}
        errors: list[str] = []
        late = float("inf")
        deadline = time.monotonic() + timeout_s
        while len(results) + len(errors) < self.world_size:
            try:
                rank, ok, value = self._results.get(timeout=0.5)
            except queue.Empty:
                dead = [rank for rank, process in enumerate(self._ranks) if not process.is_alive()]
                missing = [rank for rank in range(self.world_size) if rank not in results]
                if dead or time.monotonic() > min(deadline, late):
                    self.close()
                    why = f"ranks {dead} died" if dead else f"ranks {missing} gave no answer in {timeout_s:.0f} s"
                    raise RankFailed("\n".join(errors) or why) from None
                continue
            if ok:
                results[rank] = value
            else:
                errors.append(f"rank {rank}:\n{value}")
                late = min(late, time.monotonic() + LATE_S)
        if errors:
            raise RankFailed("\n".join(errors))
        return [results[rank] for rank in range(self.world_size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._ranks)

    def close(self) -> None:
        """End the ranks."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    args: Sequence[Any] = (),
    *,
    timeout_s: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Start `world_size` ranks, return function(rank, world_size, *args) of each, stop them. Raises: RankFailed."""
    with Pool(world_size, environment=environment) as pool:
        return pool.run(function, *args, timeout_s=timeout_s)


def _serve(rank: int, world_size: int, rendezvous: str, tasks: Any, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    from bigdssm.utils import device

    device.instruction_set = lambda device="cpu": "arm_bf16"  # as tests/conftest.py does in the test's own process
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while True:  # until it is killed
        function, args = tasks.get()
        try:
            results.put((rank, True, function(rank, world_size, *args)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
