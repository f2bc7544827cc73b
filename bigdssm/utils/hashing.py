"""Stable hashes across machines and versions: 64-bit keys of values and columns, checksums of files and code.

Strings are hashed one by one, about 10 million per second. The plugin polars-hash is faster, but hangs in a process
forked from one that used Polars, which loader processes may be.

Shape: R strings.
"""

import json
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import xxhash

_MASK = (1 << 64) - 1
MIX64_ROUNDS = 2
MIX64_INCREMENT = 0x9E3779B97F4A7C15
MIX64_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))  # x ^= x >> distance; x *= factor


def hash64(text: str) -> int:
    """Return the signed 64-bit xxh3 of `text`: the key of documents and queries in all files."""
    return int(np.int64(np.uint64(xxhash.xxh3_64_intdigest(text.encode()))))


def hex64(text: str) -> str:
    """Return the 64-bit xxh3 of `text` in hex, for names of files and folders."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """Hash integers with a key, uint64 (the finaliser of splitmix64, twice)."""
    x = values.astype(np.uint64) + np.uint64(key & _MASK)
    for _ in range(MIX64_ROUNDS):
        x += np.uint64(MIX64_INCREMENT)
        for distance, factor in MIX64_STEPS:
            x ^= x >> np.uint64(distance)
            if factor is not None:
                x *= np.uint64(factor)
    return x


def signed64(value: int) -> int:
    """Return the int64 with the same lower 64 bits, for tensors."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def derive_key(*parts: int) -> int:
    """Combine integers into a 64-bit key; their order matters."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([part & _MASK], np.uint64), key)[0])
    return key


def file_checksum(path: Path, size: int | None = None, *, bits: Literal[64, 128] = 128) -> str:
    """Return the xxh3 of a file, or of its first `size` bytes, in hex.

    Dataset files use 64 bits (damage); all other files use 128 (identity of models).
    """
    digest = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while chunk := file.read(min(left, 1 << 22)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def json_checksum(content: object) -> str:
    """Return the xxh3_128 of JSON content in hex, independent of key order; other values are hashed as str."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())


def code_checksum() -> str:
    """Return a checksum of all source files of this package."""
    root = Path(sys.modules["bigdssm"].__file__ or "").parent
    digest = xxhash.xxh3_64()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


BATCH_SIZE = 1 << 14  # strings per batch: their Python objects fit into the core's cache


def hash_strings(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return hash64 of every string, int64 [R]. The array must not contain nulls."""
    hashes = [np.empty(0, np.uint64)]
    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        for first in range(0, len(chunk), BATCH_SIZE):
            values = chunk.slice(first, BATCH_SIZE).cast(pa.large_binary()).to_pylist()
            hashes.append(np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values)))
    return np.concatenate(hashes).view(np.int64)


def flat_strings(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets, int64 [R + 1], and the bytes, uint8, of a large_string or large_binary array."""
    _, offsets, data = array.buffers()
    begins = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(data or b"", np.uint8)[begins[0] : begins[-1]]
    return begins - begins[0], content
