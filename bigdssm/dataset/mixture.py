"""What a mixture is: parts of a joined dataset, and how many steps each gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigdssm.errors import ConfigError

MixtureBatches = Literal["mixed", "one_source"]
ROUND_STEPS = 1000  # of a lane, over which the shares of a mixture are exact


@dataclass(frozen=True)
class MixturePart:
    """The partitions [first, last) of a joined dataset, which come from one source."""

    name: str
    first: int
    last: int
    weight: float


def steps_per_round(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Return how many of ROUND_STEPS each source gets: its share, the largest remainders rounded up.

    Raises ConfigError where a weight is too small for a single one.
    """
    shares = np.array(weights, float) / max(weights)  # their sum cannot overflow
    exact = shares / shares.sum() * ROUND_STEPS
    steps = np.floor(exact).astype(np.int64)
    missing = ROUND_STEPS - int(steps.sum())
    steps[np.argsort(-(exact - steps), kind="stable")[:missing]] += 1
    for name, weight, count in zip(names, weights, steps.tolist(), strict=True):
        if not count:
            needed = max(weights) / ROUND_STEPS * float(shares.sum())
            raise ConfigError(f"data.mixture: {name} has weight {weight}, needs at least {needed:g}, a thousandth")
    return [int(count) for count in steps]
