"""Vocabularies: the distinct strings that a feature knows, in the order of their codes, mapped from files.

A vocabulary consists of parts, one for each partition that brought new values. A part is one Arrow file of one record
batch, written once and mapped by all processes that look values up:

    value   the strings, in the order of their codes
    hash    the hashes of all of them, sorted
    code    of each hash: where its string stands among the values

so that row i of `value` has nothing to do with row i of `hash`. Its metadata tell how many values stand before it, and
a digest of its values and their codes; the sum of the parts' digests tells vocabularies apart, however they are cut.

Shapes: R strings that are looked up, V values of a part.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.errors import DataError
from bigdssm.utils.arrow import open_arrow
from bigdssm.utils.atomic import new_file, remove
from bigdssm.utils.hashing import file_checksum, mix64
from bigdssm.utils.string_hashing import flat_strings, hash_strings

MAX_VALUES = 2**31 - 8  # codes are int32, and the first of them are no values
VALUES_AT_ONCE = 1 << 16

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
        """For `of`, `open` and what makes one of another."""
        self._parts = tuple(parts)
        self._firsts = np.cumsum([0, *(len(part.values) for part in parts)])

    @classmethod
    def of(cls, values: Iterable[str]) -> Vocabulary:
        """Return one in memory."""
        return cls().grown(pa.array(values, pa.large_string()))

    @classmethod
    def open(cls, files: Iterable[PartFile]) -> Vocabulary:
        """Return the one in these files, in this order. Raises DataError: missing, or no part, or not of these rows."""
        vocabulary = cls()
        for file in files:
            vocabulary = vocabulary.with_file(file)
        return vocabulary

    @property
    def files(self) -> tuple[PartFile, ...]:
        """Return the files of the parts; for one that `saved` returned."""
        return tuple(part.file for part in self._parts if part.file is not None)

    @property
    def checksum(self) -> str:
        """Return 64 bits, in hex, that tell its values and their order."""
        return f"{sum(part.digest for part in self._parts) % 2**64:016x}"

    def grown(self, values: pa.Array) -> Vocabulary:
        """Return it with a part in memory behind the others; `values`, large_string, are distinct and not in it."""
        return Vocabulary([*self._parts, _Part.of(values, len(self))]) if len(values) else self

    def with_file(self, file: PartFile) -> Vocabulary:
        """Return it with the part in a file behind the others. Raises DataError: that is not where it belongs."""
        part = _Part.open(file)
        if part.first != len(self):
            raise DataError(f"{file.path} belongs behind {part.first} values, here are {len(self)}; copy all parts")
        return Vocabulary([*self._parts, part])

    def cut(self, size: int) -> Vocabulary:
        """Return its first so many values."""
        kept = zip(self._parts, self._firsts.tolist(), strict=False)
        return Vocabulary([part.cut(size - first) for part, first in kept if first < size])

    def saved(self, folder: Path, stem: str) -> Vocabulary:
        """Return it in files of `folder` called STEM.NUMBER.arrow; parts that are files already are linked or copied.

        Raises OSError, which names the file.
        """
        if self._parts:
            folder.mkdir(parents=True, exist_ok=True)
        places = (folder / f"{stem}.{number:06d}.arrow" for number in range(len(self._parts)))
        return Vocabulary([part.saved(path) for part, path in zip(self._parts, places, strict=True)])

    def codes(self, values: pa.Array) -> np.ndarray:
        """Return the code of every string, int32 [R], -1 where it is unknown. Nulls are not for it."""
        values = values.cast(pa.large_string())
        hashes = hash_strings(values).view(np.uint64)
        codes = np.full(len(values), -1, np.int32)
        left = np.argsort(hashes)  # a search for one value after the next finds them near each other
        for part in self._parts:
            found = part.find(values, hashes, left)
            codes[left] = np.where(found < 0, -1, found + part.first)
            left = left[found < 0]
        return codes

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, code: int) -> str:
        if not 0 <= code < len(self):
            raise IndexError(f"code {code} of a vocabulary of {len(self)} values")
        part = int(np.searchsorted(self._firsts, code, "right")) - 1
        value: str = self._parts[part].values[code - int(self._firsts[part])].as_py()
        return value

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            for first in range(0, len(part.values), VALUES_AT_ONCE):
                yield from part.values.slice(first, VALUES_AT_ONCE).to_pylist()

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
    """Some values, mapped from a file or in memory, and how to find them."""

    values: pa.Array  # large_string [V]
    hashes: np.ndarray  # uint64 [V], sorted
    codes: np.ndarray  # int32 [V]
    first: int  # the values of the parts before it
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
            raise DataError(f"{file.path} is no part of a vocabulary ({error}); copy it again") from None
        if batch.num_rows != file.rows:
            raise DataError(f"{file.path} has {batch.num_rows} values, needs {file.rows}; copy its folder whole")
        return cls(batch["value"], batch["hash"].to_numpy(), batch["code"].to_numpy(), first, digest, file)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Part.open, (self.file,)) if self.file else (_Part.of, (self.values, self.first))

    def saved(self, path: Path) -> _Part:
        if self.file is None:
            return _Part.open(write_part(path, [self.values], self.first))
        if not (path.exists() and os.path.samefile(self.file.path, path)):
            with new_file(path) as aside:
                _link_or_copy(self.file.path, aside)
        return _Part.open(replace(self.file, path=path))

    def cut(self, size: int) -> _Part:
        """Return its first so many values: itself, or what is in memory."""
        return self if size >= len(self.values) else _Part.of(self.values.slice(0, size), self.first)

    def find(self, values: pa.Array, hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the place here of those of R strings that stand in `rows`, int64 [rows], -1 where it has them not."""
        found = np.full(len(rows), -1, np.int64)
        left = np.arange(len(rows))
        at = np.searchsorted(self.hashes, hashes[rows])
        while True:  # once, and again as long as strings have another's hash
            met = at < len(self.hashes)
            met[met] = self.hashes[at[met]] == hashes[rows[left[met]]]
            left, at = left[met], at[met]
            if not len(left):
                return found
            places = self.codes[at]
            same = pc.equal(self.values.take(pa.array(places)), values.take(pa.array(rows[left]))).to_numpy(False)
            found[left[same]] = places[same]
            left, at = left[~same], at[~same] + 1


def write_part(path: Path, batches: Iterable[pa.Array], first: int = 0) -> PartFile:
    """Write strings, distinct and at least one, as the part of a vocabulary behind `first` other values.

    Beside a batch it holds 20 bytes a value in memory, and on disk for a time twice what it writes. Raises DataError:
    too many values; OSError, which names the file.
    """
    with new_file(path) as aside, ExitStack() as stack:
        contents, ends, hashes = (stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(3))
        ends.write(np.int64(0).tobytes())
        digest, rows, size = 0, 0, 0
        for batch in batches:
            begins, content = flat_strings(batch.cast(pa.large_string()))
            hashed = hash_strings(batch).view(np.uint64)
            digest += _digest(hashed, first + rows + np.arange(len(batch)))
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
        schema = pa.schema(list(_COLUMNS.items()), {"first": str(first), "digest": str(digest % 2**64)})
        columns = [values, pa.array(in_memory), pa.array(codes)]
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return PartFile(path, rows, file_checksum(path, bits=64))


def _digest(hashes: np.ndarray, codes: np.ndarray) -> int:
    """Return the sum of a hash of each value and its code, whatever the order in which they come."""
    return int(mix64(hashes ^ mix64(codes, 0), 0).sum())


def _mapped(file: IO[bytes]) -> pa.Buffer:
    file.flush()
    return pa.py_buffer(np.memmap(file, mode="r")) if file.tell() else pa.py_buffer(b"")


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or, on another file system, a copy: parts are never changed."""
    remove(target)  # what a killed run left
    source = source.resolve()  # not a link to a link, such as those into a cache
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
