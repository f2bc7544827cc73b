"""How vectors lie in a file: as they are, or coded in fewer bits; and how they are read as float32 again.

float32, float16   [N, D+1] numbers
int8, binary       [N] rows of (code, scale, beta), for which a vector is [scale * code, beta]: code int8 [D], or of
                   binary a sign each, uint8 [⌈D / 8⌉] as numpy.packbits writes them (1 is +1, 0 is -1)

The scale is each vector's own: of int8 the largest magnitude over 127, of binary the mean magnitude, which is the
nearest that signs come to it (Rastegari et al. 2016, arXiv 1603.05279, eq. 6). Shapes: n or N vectors of D numbers and
beta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Dtype = Literal["float32", "float16", "int8", "binary"]
LARGEST_CODE = 127


@dataclass(frozen=True)
class CodedVectors:
    """Vectors of a file or an array, float32 wherever some are asked for."""

    rows: np.ndarray  # as `coded` makes them, mapped where they are a file's
    dtype: Dtype
    width: int  # D+1

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return some vectors, float32 [n, D+1]; of float32 a slice is not copied."""
        return decoded(self.rows[rows], self.dtype, self.width)

    def pieces(self, size: int) -> Iterator[np.ndarray]:
        """Yield all vectors in their order, so many at once."""
        for first in range(0, len(self), size):
            yield self[first : first + size]


def layout(dtype: Dtype, width: int) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the type of a row's elements and the row's shape, for vectors [.., width]."""
    if dtype in ("float32", "float16"):
        return np.dtype(dtype), (width,)
    code = (np.int8, (width - 1,)) if dtype == "int8" else (np.uint8, (-(-(width - 1) // 8),))
    return np.dtype([("code", *code), ("scale", np.float32), ("beta", np.float32)]), ()


def coded(vectors: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return float32 vectors [n, D+1] as rows of `layout`; what float16 does not hold becomes infinite."""
    element, shape = layout(dtype, vectors.shape[1])
    if shape:
        with np.errstate(over="ignore"):
            return vectors.astype(element)
    rows, values = np.empty(len(vectors), element), vectors[:, :-1]
    magnitudes = np.abs(values)
    if dtype == "int8":
        rows["scale"] = magnitudes.max(axis=1) / LARGEST_CODE
        rows["code"] = np.rint(values / np.where(rows["scale"] > 0, rows["scale"], 1)[:, None])
    else:
        rows["scale"], rows["code"] = magnitudes.mean(axis=1), np.packbits(values >= 0, axis=1)
    rows["beta"] = vectors[:, -1]
    return rows


def decoded(rows: np.ndarray, dtype: Dtype, width: int) -> np.ndarray:
    """Return rows of `layout` as float32 [n, width]."""
    if dtype in ("float32", "float16"):
        return rows.astype(np.float32, copy=False)
    vectors = np.empty((len(rows), width), np.float32)
    if dtype == "int8":
        vectors[:, :-1] = rows["code"]
    else:
        vectors[:, :-1] = np.unpackbits(rows["code"], axis=1, count=width - 1) * np.float32(2) - 1
    vectors[:, :-1] *= rows["scale"][:, None]
    vectors[:, -1] = rows["beta"]
    return vectors


def bytes_per_vector(dtype: Dtype, width: int) -> int:
    """Return what a vector takes in a file."""
    element, shape = layout(dtype, width)
    return element.itemsize * int(np.prod(shape, dtype=np.int64))
