"""Vector features: precomputed vectors, as columns of lists or as the rows of a .npy matrix."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import ConfigError, DataError
from bigdssm.features.base import Decoder, Fault, Feature, register
from bigdssm.features.columns import RowCheck, as_texts, parse_numbers
from bigdssm.features.ragged import Column
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.utils.components import bounded

MAX_DIM = 2**14
DISPLAYED_NUMBERS = 4  # of a vector


def vector_input(feature, values, exported):  # type: ignore[no-untyped-def]
    """Return the vectors, float32 [rows, dim]."""
    missing = [np.nan] * feature["dim"]
    rows = np.array([missing if value is None else value for value in values], np.float32).reshape(len(values), -1)
    if feature["normalize"]:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows.astype(feature["dtype"]).astype(np.float32)


@register
@dataclass(frozen=True)
class Vector(Feature):
    """A vector of `dim` numbers; all NaN is missing. Vectors that cannot be read are reported and missing."""

    type: ClassVar[str] = "vector"
    onnx_code: ClassVar = (vector_input,)

    dim: int = bounded(0, 0, MAX_DIM)  # length of the vectors, required
    normalize: bool = False  # to a norm of 1
    dtype: Literal["float32", "float16"] = "float32"  # in shards and catalogue; float16: half the bytes, error 1/1000
    matrix: str | None = None  # a .npy file in place of a column; its row i belongs to the table's row i

    @property
    def example(self) -> str:  # type: ignore[override]
        """Return a value as Python."""
        return f"[0.0] * {self.dim}"

    @property
    def source_columns(self) -> list[str]:
        """Return its column; none with a matrix."""
        return [] if self.matrix is not None else super().source_columns

    def check(self, key: str, side: str, docs: Mapping[str, Feature]) -> None:
        """Raise ConfigError: dim is not set."""
        if self.dim < 1:
            raise ConfigError(f"{key}.dim: got {self.dim}, needs the length of the vectors")

    def of_table(self, own: Feature) -> "Vector":
        """Return the feature with the matrix of `own`."""
        return replace(self, matrix=own.matrix) if isinstance(own, Vector) else self

    @property
    def canonical_type(self) -> pa.DataType:
        """Return a list of `dim` float32."""
        return pa.list_(pa.float32(), self.dim)

    @property
    def missing(self) -> list[float]:
        """Return a vector of NaN."""
        return [math.nan] * self.dim

    def read(self, check: RowCheck) -> pa.Array:
        """Return the vectors; invalid ones, and ones that are not finite in the dtype, are missing."""
        if self.matrix is not None and self.source not in check.batch.table.column_names:
            matrix = _matrix_in(self.matrix, self.dim)
            rows = check.batch.rows - 1  # table rows are counted from 1
            if (last := int(rows.max(initial=0))) >= len(matrix):
                raise DataError(f"{self.matrix} has {len(matrix):,} rows, and none for row {last + 1:,} of the table")
            values, wrong = np.array(matrix[rows], np.float32), np.zeros(len(rows), bool)
        else:
            values, wrong = self._of_lists(check)
        with np.errstate(over="ignore"):
            unfit = ~wrong & ~np.isfinite(values.astype(self.dtype)).all(axis=1) & ~np.isnan(values).all(axis=1)
        check.blank(unfit, f"{self.source} has a number that is not finite in {self.dtype}", None)
        values[wrong | unfit] = np.nan
        return self._lists(values)

    def _of_lists(self, check: RowCheck) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 [R, dim], NaN for missing vectors, and the mask of vectors of another length or with texts.

        A column with a text or a mixed list in one row has texts in all rows, which are parsed.
        """
        array, where = check.column(self.source), f"{check.batch.file}: column {self.source!r}"
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            written = pc.utf8_trim(array, "[] ")
            array = pc.split_pattern(pc.if_else(pc.equal(written, ""), None, written), ",")
        if pa.types.is_null(array.type):
            return np.full((len(array), self.dim), np.nan, np.float32), np.zeros(len(array), bool)
        if not (
            pa.types.is_list(array.type)
            or pa.types.is_large_list(array.type)
            or pa.types.is_fixed_size_list(array.type)
        ):
            raise DataError(f"{where} holds {array.type}, needs lists of numbers")
        inner = array.type.value_type
        parsed = pa.types.is_string(inner) or pa.types.is_large_string(inner)
        if not (parsed or pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_null(inner)):
            raise DataError(f"{where} holds {array.type}, needs lists of numbers")
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        wrong = (lengths != self.dim) & (lengths > 0)
        check.blank(wrong, f"{self.source} has {{}} numbers, needs {self.dim}", lengths)
        values = np.full((len(array), self.dim), np.nan, np.float32)
        has_dim = lengths == self.dim
        flat = array.filter(pa.array(has_dim)).flatten()
        if parsed:
            numbers, invalid = as_texts(flat.cast(pa.large_binary()), where)
            numbers, unreadable = parse_numbers(numbers)
            no_numbers = np.zeros(len(array), bool)
            no_numbers[has_dim] = (invalid | unreadable).reshape(-1, self.dim).any(axis=1)
            check.blank(no_numbers, f"{self.source} has a value that is not a number", None)
            flat, wrong = pa.array(numbers), wrong | no_numbers
        values[has_dim] = flat.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        return values, wrong

    def check_matrix(self, num_rows: int, table: str) -> None:
        """Raise DataError unless the matrix has as many rows as the table."""
        if (matrix_rows := len(_matrix_in(str(self.matrix), self.dim))) != num_rows:
            raise DataError(
                f"{self.matrix} has {matrix_rows:,} rows, but {table} has {num_rows:,}; give the matrix of this table"
            )

    def _lists(self, values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), self.dim)

    def is_missing(self, column: pa.Array) -> np.ndarray:
        """Return the mask of NaN vectors, bool [R]."""
        return np.isnan(_matrix_of(column, self.dim)[:, 0])

    def parse(self, value: str) -> list[float]:
        """Return the numbers, separated by spaces or commas, with or without brackets. Raises ConfigError."""
        try:
            numbers = [float(part) for part in value.strip().strip("[]").replace(",", " ").split()]
        except ValueError:
            numbers = []
        if len(numbers) != self.dim or not np.isfinite(np.array(numbers, np.float32)).all():
            raise ConfigError(f"{self.name} is {value[:60]!r}, needs {self.dim} finite numbers")
        return numbers

    def arrow_type(self, *, large: bool = False) -> pa.DataType:
        """Return a list of `dim` numbers of its dtype."""
        return pa.list_(pa.float16() if self.dtype == "float16" else pa.float32(), self.dim)

    def encode(self, column: pa.Array, tokenizer: TextTokenizer | None, *, large: bool = False) -> pa.Array:
        """Return the vectors, normalized if `normalize` is set."""
        values = _matrix_of(column, self.dim)
        if self.normalize:
            values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        return self._lists(values.astype(self.dtype))

    def faults(self, column: Column, vocab_size: int) -> Iterator[Fault]:
        """Yield vectors that are neither finite nor missing."""
        values = np.asarray(column)
        wrong = ~np.isfinite(values).all(axis=1) & ~np.isnan(values).all(axis=1)
        if wrong.any():
            yield wrong, lambda row: f"{self.name} has a number that is not finite"

    def array(self, column: Column) -> np.ndarray:
        """Return float32 [R, dim]."""
        return np.asarray(column, np.float32)

    def probe(self, random: np.random.RandomState, rows: int, docs: Mapping[str, Feature]) -> Column:
        """Return normally distributed vectors, a fifth of them missing."""
        values = random.randn(rows, self.dim)
        if self.normalize:
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        return np.where(random.rand(rows, 1) < 0.2, np.nan, values).astype(self.dtype)

    def describe(self, vocab_size: int) -> str:
        """Return dimension, dtype and normalization."""
        return f"{self.dim} numbers, {self.dtype}{', norm 1' if self.normalize else ''}"

    def display(self, values: np.ndarray, decoder: Decoder) -> Any:
        """Return the first numbers as text, None if missing."""
        if np.isnan(values).any():
            return None
        first = json.dumps([round(float(value), 4) for value in values[:DISPLAYED_NUMBERS]])
        return first if len(values) <= DISPLAYED_NUMBERS else f"{first[:-1]}, … {len(values)} numbers]"


def _matrix_of(column: pa.Array, dim: int) -> np.ndarray:
    return cast(np.ndarray, column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim))


def _matrix_in(path: str, dim: int) -> np.ndarray:
    """Return the memory-mapped matrix [N, dim], reopened if the file has changed. Raises DataError: it is invalid."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"matrix {path} cannot be read: {error.strerror}") from None
    return _open_matrix(path, dim, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=16)
def _open_matrix(path: str, dim: int, version: tuple[int, ...]) -> np.ndarray:
    """Return the memory-mapped matrix; `version` identifies the file's content in the cache."""
    try:
        matrix: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"matrix {path} is not a .npy file of numbers: {' '.join(str(error).split())}") from None
    if matrix.ndim != 2 or matrix.shape[1] != dim or matrix.dtype.kind not in "fiu":
        raise DataError(f"matrix {path} holds {matrix.dtype} {list(matrix.shape)}, needs numbers [rows, {dim}]")
    return matrix
