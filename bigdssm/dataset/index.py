"""The index of a split: shard, offset, number of rows and checksum of every block.

Row order, reads and counts all use the index; tar headers of shards are not read. A truncated, replaced or deleted
shard therefore appears as unreadable blocks, never as silently missing rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from bigdssm.dataset.remote import RemoteFile
from bigdssm.errors import DataError
from bigdssm.features.ragged import offsets_of

COLUMNS = {"offset": np.int64, "size": np.int64, "rows": np.int32, "queries": np.int64, "checksum": np.uint64}


@dataclass(frozen=True)
class SplitIndex:
    """The blocks of a split in all partitions, in order; arrays are [blocks]."""

    shards: tuple[Path | RemoteFile, ...]
    shard: np.ndarray  # int32: number in `shards`
    partition: np.ndarray  # int32: partition number
    block: np.ndarray  # int32: number of the block within its partition's split
    offset: np.ndarray  # int64: of the block's bytes in the shard
    size: np.ndarray  # int64
    rows: np.ndarray  # int32
    queries: np.ndarray  # int64: of its rows
    checksum: np.ndarray  # uint64: xxh3_64 of the bytes

    @cached_property
    def first_row(self) -> np.ndarray:
        """The first row id of each block, int64 [blocks + 1]; the last entry is the number of rows."""
        return offsets_of(self.rows)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return int(self.first_row[-1])

    @property
    def num_queries(self) -> int:
        """The number of queries."""
        return int(self.queries.sum())

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self.rows)

    def name(self, block: int) -> str:
        """Format a block's shard and number for messages."""
        return f"{self.shards[self.shard[block]]}, block {self.block[block]}"

    @classmethod
    def concat(cls, parts: Sequence[SplitIndex]) -> SplitIndex:
        """Concatenate the indexes of several partitions."""
        if len(parts) == 1:
            return parts[0]
        names = ("partition", "block", "offset", "size", "rows", "queries", "checksum")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        bases = np.cumsum([0] + [len(part.shards) for part in parts[:-1]])
        shard = np.concatenate([part.shard + np.int32(base) for part, base in zip(parts, bases, strict=True)])
        return cls(shards=tuple(s for part in parts for s in part.shards), shard=shard, **arrays)


def read_index(folder: Path, split: str, expected: dict[str, object], partition: int) -> SplitIndex:
    """Read a split's index in a partition's folder, validated against partition.json.

    Raises DataError: missing, unreadable, another checksum, or invalid entries.
    """
    path = folder / f"{split}.index.arrow"
    try:
        content = path.read_bytes() if path.stat().st_size < 1 << 20 else pa.memory_map(str(path)).read_buffer()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; copy the dataset whole or rebuild it") from None
    if xxhash.xxh3_64_hexdigest(content) != expected["index_checksum"]:
        raise DataError(f"{path} is damaged or belongs to other shards: its checksum is not the one in partition.json")
    try:
        table = pa.ipc.open_file(content).read_all().unify_dictionaries().combine_chunks()
        shard = table.column("shard").chunk(0) if table.num_rows else pa.array([], pa.string()).dictionary_encode()
        names = shard.dictionary.to_pylist()
        code = shard.indices.to_numpy().astype(np.int32)
        arrays = {name: table.column(name).to_numpy().astype(dtype, copy=False) for name, dtype in COLUMNS.items()}
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DataError(f"{path} is not an index of a split: {error}") from None
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".tar"):
            raise DataError(f"{path}: shard name {name!r} is not a plain file name ending in .tar; rejected")
    size, rows, queries, offset = (arrays[key] for key in ("size", "rows", "queries", "offset"))
    if len(rows) and (size.min() < 1 or rows.min() < 1 or offset.min() < 0 or (queries < rows).any()):
        raise DataError(f"{path} has blocks without bytes or rows; rebuild the dataset")
    totals = int(rows.sum()), int(queries.sum()), len(rows)
    if totals != (declared := tuple(expected[key] for key in ("rows", "queries", "blocks"))):
        got, needed = ("{} rows of {} queries in {} blocks".format(*counts) for counts in (totals, declared))
        raise DataError(f"{path} has {got}, partition.json has {needed}")
    count = len(rows)
    return SplitIndex(
        shards=tuple(folder / name for name in names),
        shard=code,
        partition=np.full(count, partition, np.int32),
        block=np.arange(count, dtype=np.int32),
        **arrays,
    )
