"""64-bit keys at write time: hashes of rows, a counter hash for splits and shuffles.

Everything that looks random in a dataset is one of these functions of the seed and a row's number or name, so the
same input and seed give the same bytes on every machine and library version.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.utils.hashing import hash64, mix64
from bigdssm.utils.string_hashing import hash_strings


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
    """Return an int64 key for the source rows at `places`, each its own; train rows are written in their order."""
    return (mix(places, "shuffle", seed) ^ np.uint64(1 << 63)).view(np.int64)


def uniform(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for every key, float64."""
    return (mix(keys, purpose, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pair_hash(query_ids: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of (query, document), int64."""
    return (mix(query_ids, "query", 0) + mix(docs, "document", 0)).astype(np.int64)
