"""What the parts of gpu.py share: where they run, how much time is left, and how they time, run and report."""

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
    """Where it runs, how much time is left, and what has come out so far."""

    device: torch.device
    rank: int
    world_size: int
    deadline: float
    small: bool
    report: dict[str, Any] = field(default_factory=dict)

    def of_first(self, number: float) -> float:
        """Return rank 0's number: where each went by its own, some would wait for others."""
        given = torch.tensor([number], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(given, 0)
        return float(given)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.of_first(self.deadline - time.monotonic())

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.rank == 0:
            print(line, flush=True)

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Print a row of a table and keep it."""
        self.report.setdefault(table, []).append(row)
        self.say("  ".join(f"{name} {value}" for name, value in row.items()))

    def skip(self, what: str, why: str) -> None:
        """Say what is left out."""
        self.add("skipped", {"skipped": what, "because": why})

    @contextmanager
    def or_skip(self, what: str) -> Iterator[None]:
        """Say what fails, and go on with what comes next; of several ranks, which would wait for one, it ends all."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1:
                raise
            self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ours(U: Tensor, W: Tensor, direction: str) -> Tensor:
    """Return the FPS loss of this rank's vectors."""
    positive = torch.arange(len(U), device=U.device)
    return fps_loss(U, W, positive, alpha=ALPHA, direction=direction).loss  # type: ignore[arg-type]


def vectors(rows: int, dim: int, bench: Bench) -> Tensor:
    """Return vectors of length 1, to be differentiated."""
    made = nn.functional.normalize(torch.randn(rows, dim, device=bench.device), dim=1)
    return made.to(torch.bfloat16).requires_grad_()


def timed(bench: Bench, run: Callable[[], Any], expected: float) -> tuple[float, int]:
    """Return the median seconds of a run, and the most memory that it took beside what was there."""
    memory = 0
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory = torch.cuda.memory_allocated()
    run()  # compiles and warms up
    bench.synchronise()
    if bench.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() - memory
    seconds = []
    for _ in range(3 if expected > 1 or bench.small else 9):
        begun = time.perf_counter()
        run()
        bench.synchronise()
        seconds.append(time.perf_counter() - begun)
    return bench.of_first(statistics.median(seconds)), memory


def run_within(command: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
    """Return a command's exit code, None where it took longer, and what it printed; all it started ends with it."""
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
