"""Writes one split of a partition: blocks of rows as Arrow streams in ordinary tars, and the index over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from webdataset import TarWriter

from bigdssm.dataset.index import COLUMNS
from bigdssm.hashing import file_checksum
from bigdssm.making.journal import State

MAX_BLOCK_ROWS, MIN_BLOCK_ROWS = 2048, 256
WANTED_BLOCKS = 64  # with fewer, lanes share blocks and windows shuffle little
MAX_SHARD_BYTES = 256 << 20
TAR_HEADER_BYTES = 512
_IPC = pa.ipc.IpcWriteOptions(compression="zstd")


def block_rows(num_rows: int) -> int:
    """Return how many rows a block of a split of `num_rows` should have."""
    return max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, num_rows // WANTED_BLOCKS))


def num_queries(table: pa.Table) -> int:
    """Return the queries that rows give: one each or, where they are pieces of sequences, one for every target."""
    if "first" not in table.column_names:
        return int(table.num_rows)
    return int(table.column("end").to_numpy().sum() - table.column("first").to_numpy().sum())


class SplitWriter:
    """Cuts the rows it is given into blocks and writes them; `close` writes the index and returns the split's entry."""

    def __init__(self, folder: Path, split: str, rows_per_block: int, state: State | None = None) -> None:
        """Begin, or go on behind the finished shards of another one's `state`, with the rows that follow theirs."""
        self._folder, self._split, self._rows_per_block = folder, split, rows_per_block
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        self._shards: list[str] = []
        self._writer: TarWriter | None = None
        self._index: dict[str, list[int]] = {name: [] for name in ("shard", *COLUMNS)}
        if state is not None:
            self._shards, self._index = list(state["shards"]), {name: list(v) for name, v in state["index"].items()}
        self.num_finished = len(self._shards)

    @property
    def num_rows(self) -> int:
        """Return the rows in blocks that are written."""
        return sum(self._index["rows"])

    def state(self) -> State:
        """Return the finished shards, for the constructor."""
        blocks = sum(shard < self.num_finished for shard in self._index["shard"])
        index = {name: values[:blocks] for name, values in self._index.items()}
        return {"shards": self._shards[: self.num_finished], "index": index}

    def write(self, columns: dict[str, pa.Array]) -> None:
        """Append rows, given as equally long columns without nulls."""
        table = pa.table(columns)
        self._pending.append(table)
        self._num_pending += table.num_rows
        if self._num_pending >= self._rows_per_block:
            table = pa.concat_tables(self._pending)
            whole = table.num_rows // self._rows_per_block * self._rows_per_block
            for start in range(0, whole, self._rows_per_block):
                self._write_block(table.slice(start, self._rows_per_block))
            self._pending, self._num_pending = [table.slice(whole)], table.num_rows - whole

    def close(self) -> dict[str, Any]:
        """Write what is left and the index; return {"rows", "queries", "blocks", "shards", "index_checksum"}."""
        if self._num_pending:
            self._write_block(pa.concat_tables(self._pending))
        if self._writer is not None:
            self._close_shard()
        path = self._folder / f"{self._split}.index.arrow"
        index = self._index
        shard = pa.DictionaryArray.from_arrays(np.array(index["shard"], np.int32), pa.array(self._shards, pa.string()))
        columns = {"shard": shard, **{name: pa.array(np.array(index[name], dtype)) for name, dtype in COLUMNS.items()}}
        batch = pa.RecordBatch.from_pydict(columns)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return {
            "rows": self.num_rows,
            "queries": sum(index["queries"]),
            "blocks": len(index["rows"]),
            "shards": self._shards,
            "index_checksum": file_checksum(path, bits=64),
        }

    def _write_block(self, table: pa.Table) -> None:
        table = table.combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=_IPC) as stream:
            stream.write_table(table)
        content = sink.getvalue().to_pybytes()
        if self._writer is not None and self._writer.tarstream.offset + len(content) > MAX_SHARD_BYTES:
            self._close_shard()
        if self._writer is None:
            self._shards.append(f"{self._split}-{len(self._shards):06d}.tar")
            self._stream = (self._folder / self._shards[-1]).open("wb")
            self._writer = TarWriter(self._stream, encoder=False, mtime=0)
        offset = self._writer.tarstream.offset + TAR_HEADER_BYTES
        self._writer.write({"__key__": f"{len(self._index['rows']):08d}", "arrow": content})
        entry = {
            "shard": len(self._shards) - 1,
            "offset": offset,
            "size": len(content),
            "rows": table.num_rows,
            "queries": num_queries(table),
            "checksum": xxhash.xxh3_64_intdigest(content),
        }
        for name, value in entry.items():
            self._index[name].append(value)

    def _close_shard(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._stream.close()
        self._writer = None
        self.num_finished = len(self._shards)
