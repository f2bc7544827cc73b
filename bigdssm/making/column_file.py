"""Writes an Arrow file of one record batch, larger than memory if need be: columns collect in files of raw buffers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from bigdssm.hashing import file_checksum
from bigdssm.making.journal import State

MOST_VALUES = 2**31 - 1  # bytes of strings or values of lists that 32-bit offsets reach


def opened(path: Path, size: int) -> BinaryIO:
    """Return a file that is written on behind its first `size` bytes; 0 begins a new one."""
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


class ColumnFile:
    """Appends columns and writes them, in `finish`, as the single uncompressed batch of an Arrow file.

    One batch, so that readers address every row in the mapped file and nothing is copied; columns have no nulls.
    Strings and lists have the offsets of the schema, but 64-bit ones where they are too many for those.
    """

    def __init__(self, path: Path, schema: pa.Schema, spool: Path, state: State | None = None) -> None:
        """Begin, or go on where another one's `state` was taken; the columns stay in `spool` to the end."""
        self._path, self._schema, self._spool = path, schema, spool
        spool.mkdir(parents=True, exist_ok=True)
        self.num_rows: int = state["rows"] if state else 0
        self._columns = [
            _Column(field.type, spool / f"{path.stem}-{i}", state["columns"][i] if state else (0, 0, 0))
            for i, field in enumerate(schema)
        ]

    def state(self) -> State:
        """Return what the constructor takes to go on from here."""
        return {"rows": self.num_rows, "columns": [column.state() for column in self._columns]}

    def append(self, columns: dict[str, pa.Array]) -> None:
        """Append equally long columns, one per field of the schema, of its types or those with 64-bit offsets."""
        for field, column in zip(self._schema, self._columns, strict=True):
            array = columns[field.name]
            assert array.type in (field.type, _large(field.type)) and not array.null_count, f"{field} got {array.type}"
            column.append(array)
        self.num_rows += len(array)

    def finish(self) -> str:
        """Write the file and return its checksum."""
        arrays = [column.finish(self.num_rows) for column in self._columns]
        schema = pa.schema([field.with_type(array.type) for field, array in zip(self._schema, arrays, strict=True)])
        with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        return file_checksum(self._path, bits=64)


class _Column:
    """One column's buffers: values, and for strings and lists the 64-bit ends of the rows."""

    def __init__(self, dtype: pa.DataType, path: Path, state: Sequence[int]) -> None:
        self._type = dtype
        self._paths = (path.with_suffix(".values"), path.with_suffix(".offsets"))
        *sizes, self._end = state
        self._values, self._offsets = (opened(p, size) for p, size in zip(self._paths, sizes, strict=True))
        self._ragged = _large(dtype) != dtype or pa.types.is_large_list(dtype)
        if self._ragged and not self._offsets.tell():
            self._offsets.write(np.zeros(1, np.int64).tobytes())

    def state(self) -> list[int]:
        for file in (self._values, self._offsets):
            file.flush()
        return [self._values.tell(), self._offsets.tell(), self._end]

    def append(self, array: pa.Array) -> None:
        if not self._ragged:
            fixed = pa.types.is_fixed_size_list(self._type)
            self._values.write((array.flatten() if fixed else array).to_numpy().tobytes())
            return
        width = np.int64 if array.type == _large(array.type) else np.int32
        offsets = np.frombuffer(array.buffers()[1], width)[array.offset : array.offset + len(array) + 1].astype(
            np.int64
        )
        if not len(offsets):
            return
        if pa.types.is_string(self._type):
            data = array.buffers()[2]
            self._values.write(memoryview(data)[offsets[0] : offsets[-1]] if data is not None else b"")
        else:
            self._values.write(array.values[offsets[0] : offsets[-1]].to_numpy().tobytes())
        self._offsets.write((offsets[1:] - offsets[0] + self._end).tobytes())
        self._end += int(offsets[-1] - offsets[0])

    def finish(self, num_rows: int) -> pa.Array:
        self._values.close()
        self._offsets.close()
        values = _mapped(self._paths[0])
        if pa.types.is_fixed_size_list(self._type):
            size = self._type.list_size * num_rows
            inner = pa.Array.from_buffers(self._type.value_type, size, [None, values])
            return pa.FixedSizeListArray.from_arrays(inner, self._type.list_size)
        if not self._ragged:
            return pa.Array.from_buffers(self._type, num_rows, [None, values])
        offsets = _mapped(self._paths[1])
        dtype = self._type if self._end <= MOST_VALUES else _large(self._type)
        if dtype != _large(dtype):
            offsets = pa.py_buffer(np.frombuffer(offsets, np.int64).astype(np.int32))
        if pa.types.is_string(self._type):
            return pa.Array.from_buffers(dtype, num_rows, [None, offsets, values])
        inner = pa.Array.from_buffers(dtype.value_type, self._end, [None, values])
        return pa.Array.from_buffers(dtype, num_rows, [None, offsets], children=[inner])


def _large(dtype: pa.DataType) -> pa.DataType:
    """Return the type with 64-bit offsets; itself where it has them or has none."""
    if pa.types.is_string(dtype):
        return pa.large_string()
    return pa.large_list(dtype.value_type) if pa.types.is_list(dtype) else dtype


def _mapped(path: Path) -> pa.Buffer:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return pa.py_buffer(b"")
    return pa.memory_map(str(path)).read_buffer()
