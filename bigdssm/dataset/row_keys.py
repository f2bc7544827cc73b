"""64-bit hashes: content hashes of rows, and counter-based ones for splits and shuffles.

All randomness in a dataset is a function of the seed and a row's ordinal or key, so equal inputs and seeds give equal
bytes on every machine and library version.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.utils.hashing import hash64, mix64
from bigdssm.utils.string_hashing import hash_strings


def hash_rows(table: pa.Table) -> np.ndarray:
    """Hash all canonical columns of every row, int64 [rows]; identifies rows without an id."""
    between, within = (pa.scalar(separator, pa.large_string()) for separator in "\x1f\x1e")

    def text(array: pa.Array) -> pa.Array:
        if pa.types.is_list(array.type):
            return pc.binary_join(array, within)
        if pa.types.is_fixed_size_list(array.type):
            rows = array.flatten().to_numpy().reshape(-1, array.type.list_size)
            return pa.array([row.tobytes().hex() for row in rows], pa.large_string())
        return array.cast(pa.large_string())

    return hash_strings(pc.binary_join_element_wise(*(text(c.combine_chunks()) for c in table.columns), between))


def row_keys(hashes: np.ndarray) -> pa.Array:
    """Return keys of documents without an id: their `hash_rows` in hexadecimal."""
    digits = pa.py_buffer(hashes.astype(">i8").tobytes().hex().encode())
    offsets = pa.py_buffer(np.arange(len(hashes) + 1, dtype=np.int64) * 16)
    return pa.Array.from_buffers(pa.large_string(), len(hashes), [None, offsets, digits])


def mix(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Hash int64 keys to uint64, independently per purpose and seed; injective in the keys."""
    return mix64(keys, hash64(f"{purpose}/{seed}"))


def shuffle_keys(ordinals: np.ndarray, seed: int) -> np.ndarray:
    """Return distinct int64 sort keys of source rows; train rows are written in their order."""
    return (mix(ordinals, "shuffle", seed) ^ np.uint64(1 << 63)).view(np.int64)


def uniform(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Map every key to a pseudorandom float64 in [0, 1)."""
    return (mix(keys, purpose, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pair_hash(query_ids: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """Hash (query, document) pairs, int64."""
    return (mix(query_ids, "query", 0) + mix(docs, "document", 0)).astype(np.int64)
