"""Reading and validating one block: bytes, checksum, Arrow batch, faults of rows.

Damage never raises here: an unusable block or row is returned as a `BadRow`. Only columns of the schema are read, and
offsets and UTF-8 are validated before they are used as indices.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from bigdssm.dataset.catalogue import MappedTable
from bigdssm.dataset.partition import SplitIndex
from bigdssm.dataset.rows import FORGOTTEN_DOC, Targets
from bigdssm.dataset.schema import Schema
from bigdssm.features import Feature, Text, stored_features
from bigdssm.features.base import Fault, outside
from bigdssm.features.history import histories_of
from bigdssm.features.ragged import from_arrow

MAX_DECODED_BYTES = 1 << 30
CONNECTIONS = 8  # per reading process: for blocks of some 100 kB latency dominates
SEGMENT_COLUMNS = ("sequence", "first", "end")  # of blocks, if the dataset has sequences
FORGOTTEN = "its user or query is forgotten"  # reason of a `BadRow` that is neither counted nor recorded
RECORD_BATCH = 3  # MessageHeader in Arrow's Message.fbs
_IPC = pa.ipc.IpcReadOptions(use_threads=False)


@dataclass(frozen=True)
class BadRow:
    """A skipped row, target of a row (at `position` in its sequence), or block (row None)."""

    shard: str
    block: int
    row: int | None
    rows: int  # skipped rows; 0 for a target of a row that has others
    reason: str
    position: int | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        position = "" if self.position is None else f", position {self.position}"
        return f"{self.shard}, block {self.block}{row}{position}: {self.reason}"


@dataclass(frozen=True)
class BlockLayout:
    """The columns of a block, and the valid ranges of their values."""

    types: dict[str, pa.DataType]
    query: dict[str, Feature]  # by block column
    num_docs: tuple[int, ...]  # catalogue size, per partition
    vocab_size: int  # of the tokenizer, 0 without text
    sequences: tuple[MappedTable, ...] = field(default=())  # one per partition, or none
    max_targets: int = 2**31  # per row: all queries of a row share one history

    @classmethod
    def of(
        cls, schema: Schema, *, num_docs: tuple[int, ...], vocab_size: int,
        sequences: tuple[MappedTable, ...], raw_text: bool = False, row_features: bool = False,
    ) -> "BlockLayout":  # fmt: skip
        """Derive the layout from the schema and the presence of sequences.

        `raw_text`: blocks store untokenized texts. `row_features`: blocks store user features, as sequences do.
        """
        types = {"query_id": pa.int64(), "relevance": pa.float32(), "doc": pa.int64()}
        elsewhere: set[str] = set()
        if sequences:
            types = {"sequence": pa.int64(), "first": pa.int32(), "end": pa.int32()}
            elsewhere = set() if row_features else set(sequences[0].schema.names)
        query = {n: f for n, f in stored_features(schema.query).items() if n not in elsewhere}
        types |= {name: f.raw_type if raw_text else f.arrow_type() for name, f in query.items()}
        max_targets = min((history.max_items for history in histories_of(schema.query).values()), default=2**31)
        return cls(types, query, num_docs, vocab_size, sequences, max_targets)


def good_rows(batch: pa.RecordBatch, bad: Sequence[BadRow]) -> np.ndarray:
    """Return the numbers of a block's rows that are not skipped, int64."""
    return np.setdiff1d(np.arange(batch.num_rows), [fault.row for fault in bad if fault.rows])


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read up to `size` bytes of a file at `offset`. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def read_block(index: SplitIndex, block: int, layout: BlockLayout) -> tuple[pa.RecordBatch | None, list[BadRow]]:
    """Read a block: its columns (None if the whole block is unusable) and its bad rows."""
    shard, number, rows = index.shards[index.shard[block]], int(index.block[block]), int(index.rows[block])

    def whole(reason: str) -> tuple[None, list[BadRow]]:
        return None, [BadRow(str(shard), number, None, rows, reason)]

    size = int(index.size[block])
    try:
        if isinstance(shard, Path):
            content = read_range(shard, int(index.offset[block]), size)
        else:
            content = shard.read(int(index.offset[block]), size, int(index.checksum[block]))
    except FileNotFoundError:
        return whole("the shard is missing")
    except OSError as error:
        return whole(f"the shard cannot be read: {error.strerror}")
    if len(content) < size:
        return whole(f"the shard is cut short: {len(content)} of the block's {size} bytes can be read")
    if xxhash.xxh3_64_intdigest(content) != int(index.checksum[block]):
        return whole("the bytes are damaged: their checksum is not the index's")
    try:
        batch = decode(content, layout)
        if index.stored_row is not None:
            batch = batch.take(pa.array(index.stored_row[index.first_row[block] : index.first_row[block + 1]]))
        if batch.num_rows != rows:
            return whole(f"it has {batch.num_rows} rows, the index has {rows}")
    except (pa.ArrowException, OSError, ValueError) as error:
        return whole(f"it cannot be used: {' '.join(str(error).split())[:200]}")
    bad: dict[int, str] = {}
    partition = int(index.partition[block])
    for mask, describe in _row_faults(batch, layout, partition):
        for row in np.flatnonzero(mask).tolist():
            bad.setdefault(row, describe(row))
    # Unusable targets: of a row without a usable one, the whole row is skipped.
    targets_skipped = []
    if layout.sequences:
        usable = np.setdiff1d(np.arange(rows), list(bad))
        columns = [batch.column(batch.schema.get_field_index(n)).to_numpy()[usable] for n in SEGMENT_COLUMNS]
        sequence, first, end = (column.astype(np.int64) for column in columns)
        targets = Targets.of(layout.sequences[partition], sequence, first, end, index.target_events(partition))
        good = targets.valid(layout.num_docs[partition])
        num_usable = np.bincount(targets.row[good], minlength=len(usable))
        for target, reason in [] if good.all() else targets.faults(layout.num_docs[partition]):
            row = int(usable[targets.row[target]])
            if num_usable[targets.row[target]]:
                targets_skipped.append(BadRow(str(shard), number, row, 0, reason, int(targets.position[target])))
            else:
                bad.setdefault(row, reason)
    return batch, [BadRow(str(shard), number, row, 1, reason) for row, reason in sorted(bad.items())] + targets_skipped


def read_blocks(
    index: SplitIndex, blocks: Sequence[int], layout: BlockLayout
) -> Iterator[tuple[pa.RecordBatch | None, list[BadRow]]]:
    """Yield `read_block` of each block; remote blocks are fetched concurrently."""
    if all(isinstance(index.shards[index.shard[block]], Path) for block in blocks):
        yield from (read_block(index, block, layout) for block in blocks)
        return
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        yield from threads.map(lambda block: read_block(index, block, layout), blocks)


def decode(content: bytes, layout: BlockLayout) -> pa.RecordBatch:
    """Decode an Arrow stream into a batch with the columns of `layout.types`.

    Raises ValueError or an Arrow error.
    """
    if (needed := max_decoded_size(content)) > MAX_DECODED_BYTES:
        raise ValueError(f"it would take {needed:,} bytes decoded, more than the {MAX_DECODED_BYTES:,} allowed")
    batch = pa.ipc.open_stream(pa.py_buffer(content), options=_IPC).read_next_batch()
    columns = []
    for name, needed_type in layout.types.items():
        position = batch.schema.get_field_index(name)
        if position < 0:
            raise ValueError(f"a block of another schema: it has no column {name}, only {batch.schema.names}")
        column = batch.column(position)
        column.validate(full=True)
        if column.type != needed_type:
            if not (pa.types.is_list(needed_type) and column.type == pa.large_list(needed_type.value_type)):
                raise ValueError(f"a block of another schema: column {name} is {column.type}, needed is {needed_type}")
            column = column.cast(needed_type)
        if column.null_count:
            raise ValueError(f"column {name} has nulls")
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(list(layout.types.items())))


def max_decoded_size(stream: bytes) -> int:
    """Return an upper bound on the decoded bytes of an Arrow stream, from its metadata without decompression.

    A block of a few kilobytes may decode to terabytes (a decompression bomb). Arrow allocates the size in the first 8
    bytes of each compressed buffer, and zstd never writes more than that, so the sum of these sizes bounds the memory
    of decoding. Raises ValueError: not an Arrow stream, or a stream with dictionaries (blocks have none).
    """
    data, position, total = memoryview(stream), 0, 0

    def read(kind: str, target: int) -> int:
        return int(struct.unpack_from(f"<{kind}", data, target)[0])

    def field_of(table: int, number: int) -> int:
        """Return the position of a field's value in a flatbuffer table, 0 if the field is absent."""
        vtable, slot = table - read("i", table), 4 + 2 * number
        offset = read("H", vtable + slot) if slot < read("H", vtable) else 0
        return table + offset if offset else 0

    def follow(table: int, number: int) -> int:
        """Return the target position of an offset field, 0 if the field is absent."""
        target = field_of(table, number)
        return target + read("I", target) if target else 0

    try:
        while position + 8 <= len(data):
            if read("I", position) != 0xFFFFFFFF:
                raise ValueError("not an Arrow stream")
            length, start = read("i", position + 4), position + 8
            if length == 0:
                break
            message, body = start + read("I", start), start + length
            kind = data[field_of(message, 1)] if field_of(message, 1) else 0
            if kind == RECORD_BATCH:
                batch = follow(message, 2)
                buffers, compressed = follow(batch, 2), field_of(batch, 3) != 0
                for number in range(read("I", buffers) if buffers else 0):
                    target = buffers + 4 + 16 * number
                    offset, size = read("q", target), read("q", target + 8)
                    plain = read("q", body + offset) if compressed and size >= 8 else -1
                    total += size if plain < 0 else plain
            elif kind != 1:
                raise ValueError("an Arrow stream with dictionaries; blocks have none")
            target = field_of(message, 3)
            position = body + (read("q", target) if target else 0)
            if position < body:
                raise ValueError("not an Arrow stream")
    except (struct.error, IndexError):
        raise ValueError("not an Arrow stream, or a damaged one") from None
    return total


def _row_faults(batch: pa.RecordBatch, layout: BlockLayout, partition: int) -> Iterator[Fault]:
    """Yield (mask of bad rows, row → reason); later checks rely on the earlier ones."""
    columns: Mapping[str, pa.Array] = dict(zip(batch.schema.names, batch.columns, strict=True))
    if layout.sequences:
        table, max_targets = layout.sequences[partition], layout.max_targets
        sequence, first, end = (columns[name].to_numpy() for name in SEGMENT_COLUMNS)
        unknown = (sequence < 0) | (sequence >= table.num_rows)
        if unknown.any():
            yield unknown, lambda row: f"sequence {sequence[row]} is not a row of the partition's {table.num_rows}"
        lengths = table.lengths("items", np.where(unknown, 0, sequence)) if table.num_rows else np.zeros(len(sequence))
        emptied = ~unknown & (lengths == 0)
        if emptied.any():
            yield emptied, lambda row: FORGOTTEN
        beyond = ~unknown & ~emptied & ((first < 0) | (end <= first) | (end > lengths))
        if beyond.any():
            where = "are outside its sequence of"
            yield beyond, lambda row: f"targets {first[row]} to {end[row]} {where} {lengths[row]} events"
        # int64: the bounds of an invalid row are arbitrary and may overflow
        too_many = ~beyond & (end.astype(np.int64) - first > max_targets)
        if too_many.any():
            limit = f"more than its history's {max_targets} items"
            yield too_many, lambda row: f"it has {end[row] - first[row]} targets, {limit}"
    else:
        num_docs = layout.num_docs[partition]
        relevance, doc = columns["relevance"].to_numpy(), columns["doc"].to_numpy()
        if not relevance.min(initial=0) >= 0 or not np.isfinite(relevance).all():
            wrong = ~(np.isfinite(relevance) & (relevance >= 0))
            yield wrong, lambda row: f"relevance is {relevance[row]}, needs a number of at least 0"
        if outside(doc, 0, num_docs):
            yield doc == FORGOTTEN_DOC, lambda row: FORGOTTEN
            limit = f"not a row of the catalogue's {num_docs}"
            yield (doc < 0) | (doc >= num_docs), lambda row: f"unknown document: {doc[row]} is {limit}"
    for name, feature in layout.query.items():
        if isinstance(feature, Text) and columns[name].type == feature.raw_type:
            yield from feature.raw_faults(columns[name])
        else:
            yield from feature.faults(from_arrow(columns[name]), layout.vocab_size)
