"""Sorted keys in mapped files: which row has a key, found by all processes in one copy of the memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bigdssm.utils.array_file import new_array


class Keys:
    """Int64 keys with the rows that have them, over several files; picklable as their paths."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __reduce__(self) -> tuple[type[Keys], tuple[Sequence[Path]]]:
        return Keys, (self.files,)

    @cached_property
    def _parts(self) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in self.files]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, int64, −1 where no file has it; of several files the last that has it counts."""
        rows = np.full(len(keys), -1, np.int64)
        # By the first 16 bits, so that each look-up goes on near the one before: three times as fast.
        order = np.argsort((keys >> 48).astype(np.int16), kind="stable")
        ordered = keys[order]
        for known, numbers in self._parts:
            if len(known) and len(keys):
                at = np.minimum(np.searchsorted(known, ordered), len(known) - 1)
                hit = known[at] == ordered
                rows[order[hit]] = numbers[at[hit]]
        return rows


def write_keys(path: Path, num_keys: int, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write (keys, rows) piece by piece, int64; the keys ascend over all pieces."""
    target = new_array(path, np.int64, (2, num_keys))
    at = 0
    for keys, rows in pieces:
        target[0, at : at + len(keys)], target[1, at : at + len(keys)] = keys, rows
        at += len(keys)
    assert at == num_keys
    target.flush()
