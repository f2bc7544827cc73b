"""Keys and hashes of 64 bits, the same on every machine and in every version: what looks random in a dataset is one."""

from __future__ import annotations

import numpy as np
import xxhash

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def hash64(text: str) -> int:
    """Return the 64-bit signed hash of `text` that identifies documents and queries everywhere (xxh3)."""
    return int(np.int64(np.uint64(xxhash.xxh3_64_intdigest(text.encode()))))


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """Return 64-bit hashes of integer `values` under `key`, uint64 (the finaliser of splitmix64, twice)."""
    x = values.astype(np.uint64) + np.uint64(key & _MASK)
    for _ in range(2):
        x += np.uint64(_GAMMA)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def derive_key(*parts: int) -> int:
    """Return a 64-bit key made of integers, each at its place."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([part & _MASK], np.uint64), key)[0])
    return key
