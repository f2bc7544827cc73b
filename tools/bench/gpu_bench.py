"""Common parts of gpu.py: device, time budget, timing, subprocesses and report."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigdssm.losses import fps_loss

ROOT = Path(__file__).parents[2]
ALPHA = 20.0


@dataclass
class Bench:
    """Device, ranks, deadline and results of a benchmark run."""

    device: torch.device
    rank: int
    world_size: int
    deadline: float
    small: bool
    report: dict[str, Any] = field(default_factory=dict)

    def of_first(self, number: float) -> float:
        """Return rank 0's number, so that all ranks take the same decisions."""
        value = torch.tensor([number], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(value, 0)
        return float(value)

    def left(self) -> float:
        """Return the remaining seconds."""
        return self.of_first(self.deadline - time.monotonic())

    def log(self, line: str) -> None:
        """Print a line on rank 0."""
        if self.rank == 0:
            print(line, flush=True)

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Print a row and add it to a table of the report."""
        self.report.setdefault(table, []).append(row)
        self.log("  ".join(f"{name} {value}" for name, value in row.items()))

    def skip(self, what: str, why: str) -> None:
        """Report a skipped measurement."""
        self.add("skipped", {"skipped": what, "because": why})

    @contextmanager
    def or_skip(self, what: str) -> Iterator[None]:
        """Report a failed measurement as skipped; with several ranks an error ends all of them."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1:
                raise
            self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def synchronize(self) -> None:
        """Synchronize with the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ours(U: Tensor, W: Tensor, direction: str) -> Tensor:
    """Return the FPS loss of this rank."""
    positive = torch.arange(len(U), device=U.device)
    return fps_loss(U, W, positive, alpha=ALPHA, direction=direction).loss  # type: ignore[arg-type]


def vectors(rows: int, dim: int, bench: Bench) -> Tensor:
    """Return random bfloat16 unit vectors that require gradients."""
    unit = nn.functional.normalize(torch.randn(rows, dim, device=bench.device), dim=1)
    return unit.to(torch.bfloat16).requires_grad_()


def timed(bench: Bench, run: Callable[[], Any], expected: float) -> tuple[float, int]:
    """Return the median seconds of a run, and its peak memory above the base in bytes."""
    memory = 0
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory = torch.cuda.memory_allocated()
    run()  # compiles and warms up
    bench.synchronize()
    if bench.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() - memory
    seconds = []
    for _ in range(3 if expected > 1 or bench.small else 9):
        begun = time.perf_counter()
        run()
        bench.synchronize()
        seconds.append(time.perf_counter() - begun)
    return bench.of_first(statistics.median(seconds)), memory


def run_within(command: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
    """Run a command; return its exit code (None: timeout) and output lines. Its process group is killed at the end."""
    with tempfile.TemporaryFile("w+") as printed:
        running = subprocess.Popen(
            command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = running.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        printed.seek(0)
        return code, printed.read().splitlines()
