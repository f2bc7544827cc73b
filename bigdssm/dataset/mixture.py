"""What a mixture is: parts of a joined dataset, and how often each has its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigdssm.errors import ConfigError

MixtureBatches = Literal["mixed", "one_source"]
TURNS = 1000


@dataclass(frozen=True)
class MixturePart:
    """The partitions [first, last) of a joined dataset, which come from one source."""

    name: str
    first: int
    last: int
    weight: float


def turns_per_round(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Return how many of TURNS each source has: its share, the largest remainders rounded up.

    Raises ConfigError where a weight is too small for a single one.
    """
    shares = np.array(weights, float) / max(weights)  # their sum cannot overflow
    exact = shares / shares.sum() * TURNS
    turns = np.floor(exact).astype(np.int64)
    missing = TURNS - int(turns.sum())
    turns[np.argsort(-(exact - turns), kind="stable")[:missing]] += 1
    for name, weight, count in zip(names, weights, turns.tolist(), strict=True):
        if not count:
            needed = max(weights) / TURNS * float(shares.sum())
            raise ConfigError(f"data.mixture: {name} has weight {weight}, needs at least {needed:g}, a thousandth")
    return [int(count) for count in turns]
