"""The vectors of a folder as the files that other engines read, each compared with the model after it was written.

vectors.fvecs     per document an int32 width and float32 values: FAISS, hnswlib, ann-benchmarks
vectors.parquet   doc_key, display, vector (list of float32): Qdrant, Vespa, Elasticsearch, DuckDB, pandas
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from bigdssm.atomic import new_file
from bigdssm.errors import CheckpointError
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.vectors import (
    DOCUMENTS_FILE,
    META_FILE,
    ROWS_AT_ONCE,
    VECTORS_FILE,
    VectorsMeta,
    load_vectors,
    read_meta,
)

FileFormat = Literal["npy", "fvecs", "parquet"]
CARD_FILE = "README.md"
CHECKED_ROWS = 256
PARITY_LIMIT = 1e-5


def write_file(folder: Path, target: FileFormat) -> Path:
    """Write the vectors of a vectors folder beside them in the format `target`; npy is there already."""
    meta = read_meta(folder)
    path = folder / f"vectors.{target}"
    if target != "npy":
        with new_file(path) as aside:
            _WRITERS[target](folder, load_vectors(folder, meta), aside)
    return path


def difference_from_model(path: Path, encoders: Encoders) -> float:
    """Return the largest difference between vectors read from a file and the model's, over their largest entry.

    Evenly spread documents are encoded for it. Raises CheckpointError where it is more than PARITY_LIMIT.
    """
    meta = read_meta(path.parent)
    rows = np.unique(np.linspace(0, meta.num_docs - 1, CHECKED_ROWS).astype(np.int64))
    written, expected = read_rows(path, rows), encoders.documents(rows).cpu().numpy()
    scale = np.abs(expected).max(axis=1).clip(min=np.finfo(np.float32).tiny)
    difference = float((np.abs(written - expected).max(axis=1) / scale).max())
    if not difference <= PARITY_LIMIT:
        raise CheckpointError(
            f"{path} holds other vectors than the model gives: they differ by {difference:.1e}, needs at most "
            f"{PARITY_LIMIT:.0e}; encode again into an empty --out"
        )
    return difference


def read_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """Return the vectors of the given rows of a file of any of the formats, float32 [n, D+1]."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)[rows]
    if path.suffix == ".fvecs":
        width = int(np.fromfile(path, np.int32, 1)[0])
        whole = np.memmap(path, np.float32, "r").reshape(-1, width + 1)
        return np.asarray(whole[rows, 1:])
    with parquet.ParquetFile(path) as file:
        return _rows_of_parquet(file, rows)


def write_card(folder: Path, score: str, parity: dict[FileFormat, float]) -> None:
    """Write README.md into a vectors folder: what the vectors are, and how to search them elsewhere."""
    meta = read_meta(folder)
    (folder / CARD_FILE).write_text(_card(meta, score, parity), encoding="utf-8")


def _card(meta: VectorsMeta, score: str, parity: dict[FileFormat, float]) -> str:
    files = "\n".join(f"| `vectors.{name}` | {_CONTENTS[name]} | {value:.1e} |" for name, value in parity.items())
    return f"""# Document vectors

{meta.num_docs:,} documents of the dataset `{meta.dataset_fingerprint}`, encoded by the model `{meta.model_checksum}`
(score: {score}).

A document's vector is [alpha * w, beta] (width {meta.width}), a query's is [u, 1]: **search by inner product**,
whatever the model's score, and append 1 to what the query tower gives. The inner product is the training score.

| file | holds | largest difference from the model, relative |
|---|---|---|
{files}

Row i of every file is row i of `{DOCUMENTS_FILE}` (Arrow: doc_key, display). `{META_FILE}` names model and dataset.
"""


def _write_fvecs(folder: Path, vectors: np.ndarray, path: Path) -> None:
    num_docs, width = vectors.shape
    with path.open("wb") as file:
        for first in range(0, num_docs, ROWS_AT_ONCE):
            rows = vectors[first : first + ROWS_AT_ONCE]
            out = np.empty((len(rows), width + 1), "<f4")
            out[:, 0] = np.array([width], "<i4").view("<f4")
            out[:, 1:] = rows
            file.write(out.tobytes())


def _write_parquet(folder: Path, vectors: np.ndarray, path: Path) -> None:
    width = vectors.shape[1]
    schema = pa.schema([("doc_key", pa.string()), ("display", pa.string()), ("vector", pa.list_(pa.float32(), width))])
    with pa.OSFile(str(folder / DOCUMENTS_FILE)) as file:
        documents = pa.ipc.open_file(file).read_all()
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(vectors), ROWS_AT_ONCE):
            flat = pa.array(np.ascontiguousarray(vectors[first : first + ROWS_AT_ONCE]).reshape(-1), pa.float32())
            some = documents.slice(first, ROWS_AT_ONCE)
            columns = [some["doc_key"], some["display"], pa.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_table(pa.table(columns, schema=schema))


def _rows_of_parquet(file: parquet.ParquetFile, rows: np.ndarray) -> np.ndarray:
    """Return the vectors of some rows, a row group at a time: the file may be larger than the memory."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    groups = np.searchsorted(starts, rows, side="right") - 1
    parts, order = [], np.argsort(groups, kind="stable")
    for group in np.unique(groups):
        column = file.read_row_group(int(group), columns=["vector"])["vector"]
        wanted = column.take(pa.array(rows[groups == group] - starts[group])).combine_chunks()
        parts.append(np.asarray(wanted.flatten()).reshape(len(wanted), -1))
    found = np.concatenate(parts)
    vectors = np.empty_like(found)
    vectors[order] = found
    return vectors


_WRITERS: dict[str, Callable[[Path, np.ndarray, Path], None]] = {"fvecs": _write_fvecs, "parquet": _write_parquet}
_CONTENTS: dict[FileFormat, str] = {
    "npy": f'float32 array, for numpy (`numpy.load("{VECTORS_FILE}", mmap_mode="r")`)',
    "fvecs": "per document an int32 width and float32 values",
    "parquet": "doc_key, display, vector (fixed-size list of float32)",
}
