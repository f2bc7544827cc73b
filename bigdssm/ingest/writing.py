"""The last steps of an ingestion: writing the catalogue, and shards with their indexes.

Each file is one job, with a fixed number of rows or blocks, so its bytes do not depend on the number of workers.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, SINCE_COLUMN
from bigdssm.dataset.partition import INDEX_COLUMNS
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, TextTokenizer, encode_columns
from bigdssm.ingest.documents import DistinctDocuments, canonical_columns
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import ROWS_PER_READ, RowTable, ranges, read_facts, write_facts
from bigdssm.utils.hashing import file_checksum

MAX_BLOCK_ROWS, MIN_BLOCK_ROWS = 2048, 256
TARGET_BLOCKS = 64  # per split; with fewer, lanes share blocks and shuffling is weaker
BLOCKS_PER_SHARD = 512
DOCUMENTS_PER_FILE = 1 << 17
TAR_HEADER_BYTES = 512
_IPC = pa.ipc.IpcWriteOptions(compression="zstd")

Encode = Callable[[pa.Table], dict[str, pa.Array]]
"""Returns block columns for rows of a split; picklable."""


def write_arrow(path: Path, columns: dict[str, pa.Array]) -> dict[str, Any]:
    """Write non-null columns as a single uncompressed batch of an Arrow file.

    Return {"file", "rows", "checksum"}. A single batch gives readers random access to the mapped file without copies.
    """
    batch = _compact(pa.RecordBatch.from_pydict(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return {"file": path.name, "rows": batch.num_rows, "checksum": file_checksum(path, bits=64)}


def _compact(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Copy rows to new buffers: the padding of a slice would contain the data after it."""
    return rows.take(pa.array(np.arange(rows.num_rows)))


def move_files(folders: Sequence[Path], target: Path) -> list[dict[str, Any]]:
    """Move the files of jobs to `target`, and return their metadata (the fact `made`).

    Files already moved by an interrupted ingestion are skipped.
    """
    entries = [read_facts(folder)["made"] for folder in folders]
    for folder, entry in zip(folders, entries, strict=True):
        if (source := folder / entry["file"]).exists():
            os.replace(source, target / entry["file"])
    return entries


def write_catalogue(
    engine: LocalEngine, documents: DistinctDocuments, features: dict[str, Feature], text: TextTokenizer | None,
    folder: Path,
    first_file: int, first_of_versions: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Write new documents and new versions to `folder`.

    Return {"file", "rows", "checksum"} of both kinds of files. Raises ConfigError: a feature has the reserved name of
    the versions' column.
    """
    times = (SINCE_COLUMN,) if documents.dated else ()

    def written(
        step: str, table: RowTable, prefix: str, more_columns: Sequence[str], first: int
    ) -> list[dict[str, Any]]:
        jobs = list(enumerate(ranges(table, DOCUMENTS_PER_FILE), first))
        work = partial(_write_documents, table, features, text, prefix, more_columns)
        return move_files(engine.map(step, jobs, work, rows=table.num_rows), folder)

    new = written("catalogue", documents.table, "", times, first_file)
    if (changed := documents.changed) is None or not changed.num_rows:
        return new, []
    if DOCUMENT_COLUMN in features:
        raise ConfigError(
            f"data.doc.{DOCUMENT_COLUMN}: the name is reserved in files of document versions, and {changed.num_rows} "
            "documents have changed; rebuild the dataset with another name"
        )
    return new, written("versions", changed, "versions-", (DOCUMENT_COLUMN, *times), first_of_versions)


def _write_documents(
    table: RowTable, features: dict[str, Feature], text: TextTokenizer | None, prefix: str, more_columns: Sequence[str],
    job: tuple[int, tuple[int, int]], folder: Path,
) -> None:  # fmt: skip
    number, (first, end) = job
    rows = table.read(first, end)
    names = ("doc_key", "doc_id", "content", "doc_title", *more_columns)
    columns = {name: rows.column(name).combine_chunks() for name in names}
    for name in ("doc_key", "doc_title"):
        columns[name] = columns[name].cast(pa.large_string())
    columns |= encode_columns(canonical_columns(rows, "d", features), features, text, large=True)
    write_facts(folder, made=write_arrow(folder / f"{prefix}{number:06d}.arrow", columns))


def block_rows(num_rows: int) -> int:
    """Return the number of rows per block for a split of `num_rows`."""
    return max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, num_rows // TARGET_BLOCKS))


def num_queries(block: pa.RecordBatch) -> int:
    """Return the number of queries: one per row or, for segments of sequences, one per target."""
    if "first" not in block.schema.names:
        return int(block.num_rows)
    return int(block.column("end").to_numpy().sum() - block.column("first").to_numpy().sum())


def write_split(engine: LocalEngine, split: str, table: RowTable, encode: Encode, folder: Path) -> dict[str, Any]:
    """Write a split's encoded rows as shards and an index in `folder`.

    Returns its metadata {"rows", "queries", "blocks", "shards", "index_checksum"}.
    """
    per_block = block_rows(table.num_rows)
    jobs = list(enumerate(ranges(table, per_block * BLOCKS_PER_SHARD)))
    work = partial(_write_shard, split, table, encode, per_block)
    entries = move_files(engine.map(f"write_{split}", jobs, work, rows=table.num_rows), folder)
    shards = [entry["file"] for entry in entries]
    index = {
        name: np.array([n for entry in entries for n in entry[name]], dtype) for name, dtype in INDEX_COLUMNS.items()
    }
    shard = np.repeat(np.arange(len(entries), dtype=np.int32), [len(entry["rows"]) for entry in entries])
    named = pa.DictionaryArray.from_arrays(shard, pa.array(shards, pa.string()))
    columns = {"shard": named, **{name: pa.array(values) for name, values in index.items()}}
    return {
        "rows": int(index["rows"].sum()),
        "queries": int(index["queries"].sum()),
        "blocks": len(shard),
        "shards": shards,
        "index_checksum": write_arrow(folder / f"{split}.index.arrow", columns)["checksum"],
    }


def _write_shard(
    split: str, table: RowTable, encode: Encode, rows_per_block: int, job: tuple[int, tuple[int, int]], folder: Path
) -> None:
    """Write one shard, a plain tar of blocks as Arrow streams, and its index entries."""
    shard, (first, end) = job
    path = folder / f"{split}-{shard:06d}.tar"
    index: dict[str, list[int]] = {name: [] for name in INDEX_COLUMNS}
    blocks = _blocks(table, encode, rows_per_block, first, end)
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks, first // rows_per_block):
            content = _stream(block)
            entry = {
                "offset": tar.offset + TAR_HEADER_BYTES,
                "size": len(content),
                "rows": block.num_rows,
                "queries": num_queries(block),
                "checksum": xxhash.xxh3_64_intdigest(content),
            }
            tar.addfile(_member(f"{number:08d}.arrow", len(content)), io.BytesIO(content))
            for name, value in entry.items():
                index[name].append(value)
    write_facts(folder, made={"file": path.name, **index})


def _blocks(table: RowTable, encode: Encode, rows_per_block: int, first: int, end: int) -> Iterator[pa.RecordBatch]:
    """Yield rows [first, end) as blocks, encoding several at a time."""
    rows_per_call = max(1, ROWS_PER_READ // rows_per_block) * rows_per_block
    for start in range(first, end, rows_per_call):
        rows = pa.RecordBatch.from_pydict(encode(table.read(start, min(start + rows_per_call, end))))
        for start_of_block in range(0, rows.num_rows, rows_per_block):
            yield rows.slice(start_of_block, rows_per_block)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """Return the header that webdataset's TarWriter would write.

    Importing it loads torch, seconds per worker.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    return member


def _stream(block: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema, options=_IPC) as stream:
        stream.write_batch(_compact(block))
    return bytes(sink.getvalue())


def write_counts(path: Path, docs: np.ndarray, counts: np.ndarray) -> str:
    """Write the train positives per catalogue row, and return the file's checksum."""
    order = np.argsort(docs)
    columns = {"doc": pa.array(docs[order]), "count": pa.array(counts[order])}
    return str(write_arrow(path, columns)["checksum"])
