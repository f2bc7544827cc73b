"""How much of the future a split by user lets a model know."""

from __future__ import annotations

import numpy as np


def younger_share(time: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Return the mean over the test targets of the share of train targets that are younger; 0 without either.

    time float64 [events]; train, test bool [events].
    """
    known, asked = np.sort(time[train]), time[test]
    if not len(known) or not len(asked):
        return 0.0
    return float(1 - np.searchsorted(known, asked, side="right").mean() / len(known))


def counts_events(time: np.ndarray, position: np.ndarray) -> bool:
    """Return whether times are no moments but number each sequence's events, from 0 or 1 on.

    time float64 [events], position int64 [events] in their sequence.
    """
    return bool((time == position).all() or (time == position + 1).all())
