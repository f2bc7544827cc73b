"""64-bit keys at write time: hashes of rows, a counter hash for splits and shuffles, numbering by first appearance.

Everything that looks random in a dataset is one of these functions of the seed and a row's number or name, so the
same input and seed give the same bytes on every machine and library version.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.hashing import hash64, mix64
from bigdssm.string_hashes import hash_strings


def hash_rows(table: pa.Table) -> np.ndarray:
    """Return a hash of all canonical columns of every row, int64 [rows]: what tells rows without an id apart."""
    between, within = (pa.scalar(separator, pa.large_string()) for separator in "\x1f\x1e")

    def text(array: pa.Array) -> pa.Array:
        if pa.types.is_list(array.type):
            return pc.binary_join(array, within)
        if pa.types.is_fixed_size_list(array.type):
            rows = array.flatten().to_numpy().reshape(len(array), -1)
            return pa.array([row.tobytes().hex() for row in rows], pa.large_string())
        return array.cast(pa.large_string())

    return hash_strings(pc.binary_join_element_wise(*(text(c.combine_chunks()) for c in table.columns), between))


def row_keys(hashes: np.ndarray) -> pa.Array:
    """Return the keys that documents without an id get: their hash of `hash_rows` in hexadecimal."""
    digits = pa.py_buffer(hashes.astype(">i8").tobytes().hex().encode())
    offsets = pa.py_buffer(np.arange(len(hashes) + 1, dtype=np.int64) * 16)
    return pa.Array.from_buffers(pa.large_string(), len(hashes), [None, offsets, digits])


def mix(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Return a uint64 hash of the int64 `keys`, another one for every purpose and seed; distinct keys stay distinct."""
    return mix64(keys, hash64(f"{purpose}/{seed}"))


def shuffle_keys(places: np.ndarray, seed: int) -> np.ndarray:
    """Return a uint64 key for the source rows at `places`; train rows are written in the order of theirs."""
    return mix(places, "shuffle", seed)


def uniform(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for every key, float64."""
    return (mix(keys, purpose, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class KeyIndex:
    """Numbers int64 keys 0, 1, … in order of first appearance, in 16 bytes a key.

    Sorted runs of doubling size: adding is amortised log n vectorised merges, a look-up one search per run.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def state(self) -> list[np.ndarray]:
        """Return the keys and numbers, run by run, for `restore`."""
        return [array for run in self._runs for array in run]

    def restore(self, state: list[np.ndarray]) -> None:
        """Become what gave `state`."""
        self._runs = list(zip(state[::2], state[1::2], strict=True))
        self._size = sum(len(keys) for keys, _ in self._runs)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of every key, -1 where it is unknown, int64."""
        numbers = np.full(len(keys), -1, np.int64)
        for run_keys, run_numbers in self._runs:
            at = np.minimum(np.searchsorted(run_keys, keys), len(run_keys) - 1)
            numbers = np.where(run_keys[at] == keys, run_numbers[at], numbers)
        return numbers

    def add(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return every key's number (new keys get the next ones) and the places where new keys first stand."""
        distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        numbers = self.find(distinct)
        new = np.flatnonzero(numbers < 0)
        by_appearance = new[np.argsort(first[new])]
        numbers[by_appearance] = self._size + np.arange(len(new))
        if len(new):
            self._size += len(new)
            self._runs.append((distinct[new], numbers[new]))
            while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
                self._merge_last()
        return numbers[inverse], first[by_appearance]

    def _merge_last(self) -> None:
        (a_keys, a_numbers), (b_keys, b_numbers) = self._runs[-2:]
        keys = np.concatenate([a_keys, b_keys])
        order = np.argsort(keys, kind="stable")
        self._runs[-2:] = [(keys[order], np.concatenate([a_numbers, b_numbers])[order])]
