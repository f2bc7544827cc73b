"""Writes an Arrow file of one record batch, larger than memory if need be: columns collect in files of raw buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash


def file_checksum(path: Path) -> str:
    """Return the xxh3_64 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class ColumnFile:
    """Appends columns and writes them, in `finish`, as the single uncompressed batch of an Arrow file.

    One batch, so that readers address every row in the mapped file and nothing is copied; columns have no nulls.
    """

    def __init__(self, path: Path, schema: pa.Schema, spool: Path) -> None:
        self._path, self._schema, self._spool = path, schema, spool
        spool.mkdir(parents=True, exist_ok=True)
        self._columns = [_Column(field.type, spool / f"{path.stem}-{i}") for i, field in enumerate(schema)]
        self.num_rows = 0

    def append(self, columns: dict[str, pa.Array]) -> None:
        """Append equally long columns, one per field of the schema, of its types."""
        for field, column in zip(self._schema, self._columns, strict=True):
            array = columns[field.name]
            assert array.type == field.type and not array.null_count, f"{field} got {array.type}"
            column.append(array)
        self.num_rows += len(array)

    def finish(self) -> str:
        """Write the file and return its checksum."""
        arrays = [column.finish(self.num_rows) for column in self._columns]
        with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_file(sink, self._schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        for column in self._columns:
            column.remove()
        return file_checksum(self._path)


class _Column:
    """One column's buffers: values, and for strings and lists the 64-bit ends of the rows."""

    def __init__(self, dtype: pa.DataType, path: Path) -> None:
        self._type = dtype
        self._paths = (path.with_suffix(".values"), path.with_suffix(".offsets"))
        self._values, self._offsets = (p.open("wb") for p in self._paths)
        self._ragged = pa.types.is_string(dtype) or pa.types.is_list(dtype) or pa.types.is_large_list(dtype)
        self._end = 0
        if self._ragged:
            self._offsets.write(np.zeros(1, np.int64).tobytes())

    def append(self, array: pa.Array) -> None:
        if not self._ragged:
            self._values.write(array.to_numpy().tobytes())
            return
        width = np.int64 if pa.types.is_large_list(self._type) else np.int32
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
        if not self._ragged:
            return pa.Array.from_buffers(self._type, num_rows, [None, values])
        offsets = _mapped(self._paths[1])
        if not pa.types.is_large_list(self._type):
            if self._end >= 1 << 31:
                raise ValueError(f"{self._paths[0].stem}: more than 2^31 values in one part; write the data in parts")
            offsets = pa.py_buffer(np.frombuffer(offsets, np.int64).astype(np.int32))
        if pa.types.is_string(self._type):
            return pa.Array.from_buffers(self._type, num_rows, [None, offsets, values])
        inner = pa.Array.from_buffers(self._type.value_type, self._end, [None, values])
        return pa.Array.from_buffers(self._type, num_rows, [None, offsets], children=[inner])

    def remove(self) -> None:
        for path in self._paths:
            path.unlink()


def _mapped(path: Path) -> pa.Buffer:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return pa.py_buffer(b"")
    return pa.memory_map(str(path)).read_buffer()
