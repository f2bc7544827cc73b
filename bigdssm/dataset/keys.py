"""Lookup of rows by key in memory-mapped files, shared by the processes on a machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bigdssm.utils.array_file import new_array


class SortedKeys:
    """A map from int64 keys to rows in several files; pickled by path."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __reduce__(self) -> tuple[type[SortedKeys], tuple[Sequence[Path]]]:
        return SortedKeys, (self.files,)

    @cached_property
    def _parts(self) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in self.files]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, int64, −1 for an unknown key; later files take precedence."""
        rows = np.full(len(keys), -1, np.int64)
        # Searching in the order of the top 16 bits is three times as fast, due to memory locality.
        order = np.argsort((keys >> 48).astype(np.int16), kind="stable")
        ordered = keys[order]
        for known, numbers in self._parts:
            at, found = find_sorted(known, ordered)
            rows[order[found]] = numbers[at[found]]
        return rows


def find_sorted(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look up keys [m] in ascending keys; return (positions int64 [m], found bool [m])."""
    at = np.minimum(np.searchsorted(sorted_keys, keys), max(len(sorted_keys) - 1, 0))
    return at, sorted_keys[at] == keys if len(sorted_keys) else np.zeros(len(keys), bool)


def write_keys(path: Path, num_keys: int, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write int64 (keys, rows) chunk by chunk; keys ascend over all chunks."""
    target = new_array(path, np.int64, (2, num_keys))
    at = 0
    for keys, rows in pieces:
        target[0, at : at + len(keys)], target[1, at : at + len(keys)] = keys, rows
        at += len(keys)
    assert at == num_keys
    target.flush()
