"""Vocabularies: the distinct strings of a feature in the order of their codes, memory-mapped from files.

A vocabulary consists of parts, one per partition with new values. A part is one Arrow file with one record batch,
written once and memory-mapped by all processes that look up values:

    value   the strings, in the order of their codes
    hash    the hashes of all strings, sorted
    code    per hash: the index of its string in `value`

Row i of `value` is unrelated to row i of `hash`. The metadata contain the number of values in earlier parts, and a
digest of the values and their codes; the sum of the parts' digests identifies a vocabulary, independent of the division
into parts.

Shapes: R strings to look up, V values of a part.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError
from bigdssm.utils.array_file import open_arrow
from bigdssm.utils.atomic import link_or_copy, new_file
from bigdssm.utils.hashing import file_checksum, flat_strings, hash_strings, mix64

MAX_VALUES = 2**31 - 8  # codes are int32, and the first ones are reserved
ITERATION_BATCH = 1 << 16

_COLUMNS = {"value": pa.large_string(), "hash": pa.uint64(), "code": pa.int32()}


@dataclass(frozen=True)
class PartFile:
    """A part of a vocabulary on disk."""

    path: Path
    rows: int
    checksum: str  # xxh3_64 of the file, in hex


class Vocabulary:
    """An immutable sequence of distinct strings; equal to another one with the same values in the same order."""

    def __init__(self, parts: Sequence[_Part] = ()) -> None:
        """Use `of` or `open`."""
        self._parts = tuple(parts)
        self._firsts = np.cumsum([0, *(len(part.values) for part in parts)])

    @classmethod
    def of(cls, values: Iterable[str]) -> Vocabulary:
        """Return a vocabulary in memory."""
        return cls().grown(pa.array(values, pa.large_string()))

    @classmethod
    def open(cls, files: Iterable[PartFile]) -> Vocabulary:
        """Return the vocabulary of these files, in this order. Raises DataError: a missing or invalid file."""
        return reduce(cls.with_file, files, cls())

    @property
    def files(self) -> tuple[PartFile, ...]:
        """Return the files of the parts, if the vocabulary was saved."""
        return tuple(part.file for part in self._parts if part.file is not None)

    @property
    def checksum(self) -> str:
        """Return a 64-bit digest of the values and their order, in hex."""
        return f"{sum(part.digest for part in self._parts) % 2**64:016x}"

    def grown(self, values: pa.Array) -> Vocabulary:
        """Return it with a part appended in memory; `values`, large_string, are distinct and new."""
        return Vocabulary([*self._parts, _Part.of(values, len(self))]) if len(values) else self

    def with_file(self, file: PartFile) -> Vocabulary:
        """Return it with the part in a file appended. Raises DataError: it does not follow this vocabulary."""
        part = _Part.open(file)
        if part.first != len(self):
            raise DataError(f"{file.path} follows {part.first} values, here are {len(self)}; copy all parts")
        return Vocabulary([*self._parts, part])

    def cut(self, size: int) -> Vocabulary:
        """Return its first `size` values."""
        parts = zip(self._parts, self._firsts.tolist(), strict=False)
        return Vocabulary([part.cut(size - first) for part, first in parts if first < size])

    def erased(self, indices: np.ndarray, folder: Path) -> Vocabulary:
        """Return it with '' at `indices`, ascending; the parts that change are written to `folder`.

        '' is never looked up. The checksum stays: the other values keep their codes. Raises OSError.
        """
        parts = []
        for part, first in zip(self._parts, self._firsts.tolist(), strict=False):
            erased = indices[(indices >= first) & (indices < first + len(part.values))] - first
            if pc.any(pc.not_equal(part.values.take(pa.array(erased)), "")).as_py():
                folder.mkdir(parents=True, exist_ok=True)
                is_erased = np.zeros(len(part.values), bool)
                is_erased[erased] = True
                values = pc.if_else(pa.array(is_erased), pa.scalar("", pa.large_string()), part.values)
                assert part.file is not None
                part = _Part.open(write_part(folder / part.file.path.name, [values], part.first, part.digest))
            parts.append(part)
        return Vocabulary(parts)

    @property
    def erased_indices(self) -> np.ndarray:
        """The indices of ''."""
        empty = [pc.equal(part.values, "").to_numpy(zero_copy_only=False) for part in self._parts]
        return np.flatnonzero(np.concatenate([np.zeros(0, bool), *empty]))

    def saved(self, folder: Path, stem: str) -> Vocabulary:
        """Save it in files STEM.NUMBER.arrow of `folder`; existing files are linked or copied. Raises OSError."""
        if self._parts:
            folder.mkdir(parents=True, exist_ok=True)
        paths = (folder / f"{stem}.{number:06d}.arrow" for number in range(len(self._parts)))
        return Vocabulary([part.saved(path) for part, path in zip(self._parts, paths, strict=True)])

    def codes(self, values: pa.Array) -> np.ndarray:
        """Return the code of every string, int32 [R], -1 if unknown; `values` has no nulls."""
        values = values.cast(pa.large_string())
        hashes = hash_strings(values).view(np.uint64)
        codes = np.full(len(values), -1, np.int32)
        remaining = np.argsort(hashes)  # sorted searches are local in memory
        for part in self._parts:
            indices = part.find(values, hashes, remaining)
            codes[remaining] = np.where(indices < 0, -1, indices + part.first)
            remaining = remaining[indices < 0]
        return codes

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, code: int) -> str:
        if not 0 <= code < len(self):
            raise IndexError(f"code {code} of a vocabulary of {len(self)} values")
        part = int(np.searchsorted(self._firsts, code, "right")) - 1
        return cast(str, self._parts[part].values[code - int(self._firsts[part])].as_py())

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            for first in range(0, len(part.values), ITERATION_BATCH):
                yield from part.values.slice(first, ITERATION_BATCH).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (len(self), self.checksum) == (len(other), other.checksum)

    def __hash__(self) -> int:
        return hash((len(self), self.checksum))

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} values, {self.checksum})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self._parts,)


@dataclass(frozen=True, eq=False)
class _Part:
    """Values with their hash index, memory-mapped from a file or in memory."""

    values: pa.Array  # large_string [V]
    hashes: np.ndarray  # uint64 [V], sorted
    codes: np.ndarray  # int32 [V]
    first: int  # number of values in earlier parts
    digest: int
    file: PartFile | None = None

    @classmethod
    def of(cls, values: pa.Array, first: int) -> _Part:
        hashes = hash_strings(values).view(np.uint64)
        digest = _digest(hashes, first + np.arange(len(values)))
        codes = np.argsort(hashes, kind="stable").astype(np.int32)
        return cls(values, hashes[codes], codes, first, digest)

    @classmethod
    def open(cls, file: PartFile) -> _Part:
        reader = open_arrow(file.path)
        try:
            if dict(zip(reader.schema.names, reader.schema.types, strict=True)) != _COLUMNS:
                raise ValueError(f"it has the columns {reader.schema.names}")
            batch = reader.get_batch(0)
            batch.validate()
            first, digest = (int(reader.schema.metadata[key]) for key in (b"first", b"digest"))
        except (pa.ArrowInvalid, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{file.path} is not part of a vocabulary ({error}); copy it again") from None
        if batch.num_rows != file.rows:
            raise DataError(f"{file.path} has {batch.num_rows} values, needs {file.rows}; copy the whole folder")
        return cls(batch["value"], batch["hash"].to_numpy(), batch["code"].to_numpy(), first, digest, file)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Part.open, (self.file,)) if self.file else (_Part.of, (self.values, self.first))

    def saved(self, path: Path) -> _Part:
        if self.file is None:
            return _Part.open(write_part(path, [self.values], self.first))
        if not (path.exists() and os.path.samefile(self.file.path, path)):
            with new_file(path) as unfinished:
                link_or_copy(self.file.path.resolve(), unfinished)
        return _Part.open(replace(self.file, path=path))

    def cut(self, size: int) -> _Part:
        """Return its first `size` values: itself, or a part in memory."""
        return self if size >= len(self.values) else _Part.of(self.values.slice(0, size), self.first)

    def find(self, values: pa.Array, hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the index in this part of the strings at `rows`, int64 [rows], -1 if unknown."""
        indices = np.full(len(rows), -1, np.int64)
        remaining = np.arange(len(rows))
        position = np.searchsorted(self.hashes, hashes[rows])
        while True:  # repeated for hash collisions only
            match = position < len(self.hashes)
            match[match] = self.hashes[position[match]] == hashes[rows[remaining[match]]]
            remaining, position = remaining[match], position[match]
            if not len(remaining):
                return indices
            codes = self.codes[position]
            same = pc.equal(self.values.take(pa.array(codes)), values.take(pa.array(rows[remaining]))).to_numpy(False)
            indices[remaining[same]] = codes[same]
            remaining, position = remaining[~same], position[~same] + 1


def write_part(path: Path, batches: Iterable[pa.Array], first: int = 0, digest: int | None = None) -> PartFile:
    """Write distinct strings, at least one, as the part of a vocabulary after `first` other values.

    `digest`: that of the strings before some of them were erased; None: of these. It needs one batch and 20 bytes per
    value in memory, and temporarily twice the file's size on disk. Raises DataError: too many values; OSError.
    """
    with new_file(path) as unfinished, ExitStack() as stack:
        contents, ends, hashes = (stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(3))
        ends.write(np.int64(0).tobytes())
        computed, rows, size = 0, 0, 0
        for batch in batches:
            begins, content = flat_strings(batch.cast(pa.large_string()))
            hashed = hash_strings(batch).view(np.uint64)
            computed += _digest(hashed, first + rows + np.arange(len(batch)))
            for file, array in ((contents, content), (ends, begins[1:] + size), (hashes, hashed)):
                file.write(array.data)
            rows, size = rows + len(batch), size + len(content)
        if first + rows > MAX_VALUES:
            raise DataError(
                f"{path}: got {first + rows} values, a vocabulary has at most {MAX_VALUES}; set hash_buckets"
            )
        values = pa.Array.from_buffers(pa.large_string(), rows, [None, _mapped(ends), _mapped(contents)])
        hashes.seek(0)
        in_memory = np.fromfile(hashes, np.uint64)
        codes = np.argsort(in_memory, kind="stable").astype(np.int32)
        in_memory.sort()
        digest = computed if digest is None else digest
        schema = pa.schema(list(_COLUMNS.items()), {"first": str(first), "digest": str(digest % 2**64)})
        columns = [values, pa.array(in_memory), pa.array(codes)]
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return PartFile(path, rows, file_checksum(path, bits=64))


def _digest(hashes: np.ndarray, codes: np.ndarray) -> int:
    """Return the sum of the hashes of each value and its code, which is independent of their order."""
    return int(mix64(hashes ^ mix64(codes, 0), 0).sum())


def _mapped(file: IO[bytes]) -> pa.Buffer:
    file.flush()
    return pa.py_buffer(np.memmap(file, mode="r")) if file.tell() else pa.py_buffer(b"")
