"""Where the time of some steps went, as a table; and how much of it the processor's best speed would have taken."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

APART = ("validation", "model folder", "checkpoint")  # spans that are no training
TOWERS = ("encode", "backward", "backward/encode again")  # spans that the towers' matrix products are in


@dataclass
class TimeTable:
    """Seconds of one rank by span (see timing.py), and the matrix products that it had to do in them."""

    elapsed_s: float = 0.0
    steps: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, more: TimeTable) -> None:
        """Count `more` in."""
        self.elapsed_s, self.steps, self.flops = (
            self.elapsed_s + more.elapsed_s, self.steps + more.steps, self.flops + more.flops
        )  # fmt: skip
        for name, seconds in more.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def training_s(self) -> float:
        """Return the seconds without those spent on what is no training."""
        apart = sum(seconds for name, seconds in self.seconds.items() if name.split("/")[0] in APART)
        return max(1e-9, self.elapsed_s - apart)

    def lines(self, peak_flops: float) -> list[str]:
        """Return the table; `peak_flops` are the processor's operations a second in a large matrix product."""
        named = sum(self.seconds.values())
        rows = [*sorted(self.seconds.items()), ("other", max(0.0, self.elapsed_s - named))]
        elapsed = max(1e-9, self.elapsed_s)
        lines = [f"{self.elapsed_s:.1f} s in {self.steps} steps"]
        lines += [f"{name:28s} {seconds:9.2f} s {seconds / elapsed:6.1%}" for name, seconds in rows]
        towers = max(1e-9, sum(self.seconds.get(name, 0.0) for name in TOWERS))
        lines.append(
            f"the towers' matrix products, padding and repetition left out: {self.flops / towers / peak_flops:.0%} of "
            f"the peak of {peak_flops / 1e9:.0f} GFLOP/s in encode and backward, "
            f"{self.flops / self.training_s / peak_flops:.0%} over all training"
        )
        return lines


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, turns: int = 5) -> float:
    """Return the operations a second of the best of some products of two `size` × `size` matrices."""
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(turns):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
