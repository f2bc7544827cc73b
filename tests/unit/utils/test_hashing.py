"""Hashes of string columns equal those of the single strings."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.utils.hashing import BATCH_SIZE, hash64, hash_strings

# all lengths from 0 to 40 bytes and some longer ones, with one, two and four bytes per character
LETTERS = ("abcdefg", "é", "😀x")
VALUES = [(text * 300)[shift : shift + length] for text in LETTERS for length in range(41) for shift in range(3)]
VALUES += ["long " * length for length in (26, 49, 300)]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_a_column_has_the_hashes_of_its_strings(type_: pa.DataType) -> None:
    expected = [hash64(value) for value in VALUES]
    array = pa.array(["before", *VALUES, "behind"], type_).slice(1, len(VALUES))
    assert hash_strings(array).tolist() == expected
    assert hash_strings(pa.chunked_array([array[:7], array[7:7], array[7:]])).tolist() == expected
    for value, hashed in zip(VALUES, expected, strict=True):  # a single string: no out-of-bounds reads
        assert hash_strings(pa.array([value], type_)).tolist() == [hashed]


def test_a_column_longer_than_one_hash_batch() -> None:
    values = [f"u{number}" for number in range(BATCH_SIZE + 5)]
    hashes = hash_strings(pa.array(values))
    assert hashes.dtype == np.int64 and len(hashes) == len(values)
    assert [hashes[i] for i in (0, BATCH_SIZE - 1, BATCH_SIZE, -1)] == [
        hash64(values[i]) for i in (0, BATCH_SIZE - 1, BATCH_SIZE, -1)
    ]
    assert hash_strings(pa.array([], pa.string())).tolist() == []
