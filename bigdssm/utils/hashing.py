"""Stable hashes across machines and versions: 64-bit keys of values and columns, checksums of files and code.

String columns are hashed in NumPy up to 16 bytes (most ids). Longer strings use the xxhash package one by one: NumPy is
not faster for them. The plugin polars-hash is faster for all lengths, but hangs in a process forked from one that used
Polars, which loader processes may be. Source: https://github.com/Cyan4973/xxHash/blob/v0.8.3/doc/xxhash_spec.md, "XXH3
algorithm overview", small inputs.

Shapes: R strings, `data` uint8 [total bytes], `start` and `length` int64 [R]; hashes uint64 [R].
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import xxhash
from xxhash import xxh3_64_intdigest

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def hash64(text: str) -> int:
    """Return the signed 64-bit xxh3 of `text`: the key of documents and queries in all files."""
    return int(np.int64(np.uint64(xxhash.xxh3_64_intdigest(text.encode()))))


def hex64(text: str) -> str:
    """Return the 64-bit xxh3 of `text` in hex, for names of files and folders."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """Hash integers with a key, uint64 (the finaliser of splitmix64, twice)."""
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
    """Combine integers into a 64-bit key; their order matters."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([part & _MASK], np.uint64), key)[0])
    return key


def file_checksum(path: Path, first: int = 0, last: int | None = None, *, bits: Literal[64, 128] = 128) -> str:
    """Return the xxh3 of a file, or of its bytes [first, last), in hex.

    Dataset files use 64 bits (damage); all other files use 128 (identity of models).
    """
    digest = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
    left = path.stat().st_size - first if last is None else last - first
    with path.open("rb") as file:
        file.seek(first)
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


MAX_BYTES = 16  # length of the longest strings hashed in NumPy
BATCH_SIZE = 1 << 14  # strings per batch: intermediate arrays fit into the core's cache

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
)
_WORDS = [np.uint64(int.from_bytes(_SECRET[i : i + 8], "little")) for i in range(0, len(_SECRET), 8)]
_LOW = np.uint64(0xFFFFFFFF)
_PRIME_MX = np.uint64(0x9FB21C651E98DF25)


def hash_strings(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return hash64 of every string, int64 [R]. The array must not contain nulls."""
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    hashes = [np.empty(0, np.int64)]
    for chunk in chunks:
        for first in range(0, len(chunk), BATCH_SIZE):
            batch = chunk.slice(first, BATCH_SIZE).cast(pa.large_binary())
            begins, data = flat_strings(batch)
            start, length = begins[:-1], np.diff(begins)
            batch_hashes = np.empty(len(batch), np.uint64)
            for shortest, longest, hash_ids in _BY_LENGTH:
                selected = np.flatnonzero((length >= shortest) & (length <= longest))
                if len(selected):
                    batch_hashes[selected] = hash_ids(data, start[selected], length[selected])
            others = np.flatnonzero((length == 0) | (length > MAX_BYTES))
            if len(others):
                values = batch if len(others) == len(batch) else batch.take(pa.array(others))
                batch_hashes[others] = np.fromiter(map(xxh3_64_intdigest, values.to_pylist()), np.uint64, len(others))
            hashes.append(batch_hashes.view(np.int64))
    return np.concatenate(hashes)


def flat_strings(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets, int64 [R + 1], and the bytes, uint8, of a large_string or large_binary array."""
    _, offsets, data = array.buffers()
    begins = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(data or b"", np.uint8)[begins[0] : begins[-1]]
    return begins - begins[0], content


def _up_to_3(data: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    first, middle, last = (data[i].astype(np.uint64) for i in (start, start + (length >> 1), start + length - 1))
    h = first << np.uint64(16) | middle << np.uint64(24) | last | length.astype(np.uint64) << np.uint64(8)
    h ^= (_WORDS[0] ^ _WORDS[0] >> np.uint64(32)) & _LOW
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC2B2AE3D27D4EB4F)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0x165667B19E3779F9)
    return h ^ h >> np.uint64(32)


def _up_to_8(data: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    words = _integers(data, 4)
    first, last = words[start].astype(np.uint64), words[start + length - 4].astype(np.uint64)
    h = (last | first << np.uint64(32)) ^ _WORDS[1] ^ _WORDS[2]
    h ^= _rotated(h, 49) ^ _rotated(h, 24)
    h *= _PRIME_MX
    h ^= (h >> np.uint64(35)) + length.astype(np.uint64)
    h *= _PRIME_MX
    return h ^ h >> np.uint64(28)


def _up_to_16(data: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    words = _integers(data, 8)
    low = words[start] ^ _WORDS[3] ^ _WORDS[4]
    high = words[start + length - 8] ^ _WORDS[5] ^ _WORDS[6]
    h = length.astype(np.uint64) + low.byteswap() + high + _folded_product(low, high)
    h ^= h >> np.uint64(37)
    h *= np.uint64(0x165667919E3779F9)
    return h ^ h >> np.uint64(32)


_BY_LENGTH: tuple[tuple[int, int, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]], ...] = (
    (1, 3, _up_to_3), (4, 8, _up_to_8), (9, MAX_BYTES, _up_to_16),
)  # fmt: skip


def _integers(data: np.ndarray, width: int) -> np.ndarray:
    """Return a view of the little-endian unsigned integers of `width` bytes that start at each byte."""
    return np.ndarray(len(data) - width + 1, f"<u{width}", data, strides=(1,))


def _rotated(h: np.ndarray, bits: int) -> np.ndarray:
    return h << np.uint64(bits) | h >> np.uint64(64 - bits)


def _folded_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the exclusive or of both halves of the 128-bit products."""
    half = np.uint64(32)
    a_low, a_high, b_low, b_high = a & _LOW, a >> half, b & _LOW, b >> half
    low, middle = a_low * b_low, a_high * b_low
    cross = (low >> half) + (middle & _LOW) + a_low * b_high
    return ((middle >> half) + (cross >> half) + a_high * b_high) ^ (cross << half | low & _LOW)
