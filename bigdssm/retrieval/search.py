"""Search queries as people give them: a known user, a typed history, or typed feature values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigdssm.data import Dataset, Rows
from bigdssm.errors import DataError

NUM_SUGGESTIONS = 3


def find_documents(names: Sequence[str], keys: Sequence[str], display: Sequence[str]) -> np.ndarray:
    """Return int64 catalogue rows of documents named by key or display name, whatever the case.

    Raises DataError that suggests the nearest names where one is unknown.
    """
    by_key = {key: row for row, key in enumerate(keys)}
    by_name = {name.casefold(): row for row, name in reversed(list(enumerate(display)))}
    rows = []
    for name in names:
        row = by_key.get(name, by_name.get(name.strip().casefold()))
        if row is None:
            raise DataError(f"no document is called {name!r}; the nearest are: {_nearest(name, display)}")
        rows.append(row)
    return np.array(rows, np.int64)


def _nearest(name: str, display: Sequence[str]) -> str:
    wanted = name.strip().casefold()
    inside = [title for title in display if wanted in title.casefold()][:NUM_SUGGESTIONS]
    if not inside:
        folded = {title.casefold(): title for title in display}
        close = difflib.get_close_matches(wanted, list(folded), NUM_SUGGESTIONS, 0.0)
        inside = [folded[title] for title in close]
    return "; ".join(inside)
