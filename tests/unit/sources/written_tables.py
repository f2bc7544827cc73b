"""A table, written in the ways that sources of it are stored."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.sources.base import Source

ROWS = 250
TABLE = pa.table(
    {
        "id": [f"{i:03d}" for i in range(ROWS)],
        "kind": pa.array([f"k{i % 3}" for i in range(ROWS)]).dictionary_encode(),
        "number": list(range(ROWS)),
    }
)


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def in_parts(source: Source, *columns: str) -> list[list[tuple[int, dict[str, Any]]]]:
    """Return each part's rows, read by an unpickled copy of the source, last part first."""
    parts = source.parts()
    read: list[list[tuple[int, dict[str, Any]]]] = []
    for part in reversed(parts):
        copy, mine = pickle.loads(pickle.dumps((source, part)))
        batches = list(copy.batches(mine, columns, no_bad))
        read.insert(0, [pair for b in batches for pair in zip(b.rows.tolist(), b.table.to_pylist(), strict=True)])
    return read


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(TABLE.slice(0, 120), folder / "part-00000.snappy.parquet", row_group_size=50)
    pq.write_table(TABLE.slice(120, 0), folder / "part-00001.snappy.parquet")
    pq.write_table(TABLE.slice(120), folder / "part-00002.snappy.parquet", row_group_size=50)
    for name in ("_SUCCESS", ".part-00000.snappy.parquet.crc"):
        (folder / name).write_bytes(b"")
    return folder


def write_saved(folder: Path, state: Any = None) -> Path:
    """Write the format of datasets.Dataset.save_to_disk."""
    folder.mkdir()
    for number, start in enumerate((0, 120)):
        write_arrow(
            folder / f"data-0000{number}-of-00002.arrow", pa.ipc.new_stream, TABLE.slice(start, 120 + 10 * number)
        )
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None, **(state or {})}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_arrow(path: Path, new: Callable[..., Any], table: pa.Table = TABLE, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=50)
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(TABLE, path, row_group_size=50)
    return path


def no_bad(*told: object, **more: object) -> None:
    raise AssertionError(told)
