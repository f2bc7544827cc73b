"""The vectors of a folder as the files that other engines read, each compared with the model after it was written.

vectors.fvecs     per document an int32 width and float32 values: FAISS, hnswlib, ann-benchmarks; of float32 alone
vectors.parquet   doc_key, doc_title, vector (list of float32 or float16, or a code of int8 or uint8 with its scale and
                  beta): Qdrant, Vespa, Elasticsearch, DuckDB, pandas
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.vectors import (
    DOCUMENTS_FILE,
    META_FILE,
    ROWS_AT_ONCE,
    VECTORS_FILE,
    CodedVectors,
    Dtype,
    VectorsMeta,
    decoded,
    layout,
    load_vectors,
    read_meta,
)
from bigdssm.utils.atomic import new_file

FileFormat = Literal["npy", "fvecs", "parquet"]
CARD_FILE = "README.md"
CHECKED_ROWS = 256
# What a vector may differ by, over its largest entry: int8 rounds to half a 127th, and a sign keeps no magnitude, but
# stays within the largest, which a wrong sign of that entry does not.
PARITY_LIMITS: dict[Dtype, float] = {"float32": 1e-5, "float16": 1e-3, "int8": 5e-3, "binary": 1 + 1e-5}


def check_formats(dtype: Dtype, targets: Iterable[FileFormat]) -> None:
    """Raise ConfigError where vectors of this dtype cannot be written in a format."""
    if dtype != "float32" and "fvecs" in targets:
        raise ConfigError(f"--format fvecs --dtype {dtype}: fvecs holds float32 alone; take parquet")


def write_file(folder: Path, target: FileFormat) -> Path:
    """Write the vectors of a vectors folder beside them in the format `target`; npy is there already."""
    meta = read_meta(folder)
    check_formats(meta.dtype, [target])
    path = folder / f"vectors.{target}"
    if target != "npy":
        with new_file(path) as aside:
            _WRITERS[target](folder, load_vectors(folder, meta), aside)
    return path


def difference_from_model(path: Path, encoders: Encoders) -> float:
    """Return the largest difference between vectors read from a file and the model's, over their largest entry.

    Evenly spread documents are encoded for it. Raises CheckpointError where it is more than the dtype's PARITY_LIMITS.
    """
    meta = read_meta(path.parent)
    rows = np.unique(np.linspace(0, meta.num_docs - 1, CHECKED_ROWS).astype(np.int64))
    written, expected = read_rows(path, rows), encoders.documents(rows).cpu().numpy()
    limit = PARITY_LIMITS[meta.dtype]
    scale = np.abs(expected).max(axis=1).clip(min=np.finfo(np.float32).tiny)
    difference = float((np.abs(written - expected).max(axis=1) / scale).max())
    if not difference <= limit:
        raise CheckpointError(
            f"{path} holds other vectors than the model gives: they differ by {difference:.1e}, needs at most "
            f"{limit:.0e}; encode again into an empty --out"
        )
    return difference


def read_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """Return the vectors of the given rows of a file of any of the formats, float32 [n, D+1]."""
    meta = read_meta(path.parent)
    if path.suffix == ".npy":
        return decoded(np.load(path, mmap_mode="r", allow_pickle=False)[rows], meta.dtype, meta.width)
    if path.suffix == ".fvecs":
        width = int(np.fromfile(path, np.int32, 1)[0])
        whole = np.memmap(path, np.float32, "r").reshape(-1, width + 1)
        return np.asarray(whole[rows, 1:])
    with parquet.ParquetFile(path) as file:
        return decoded(_rows_of_parquet(file, rows, meta), meta.dtype, meta.width)


def write_card(folder: Path, score: str, parity: dict[FileFormat, float]) -> None:
    """Write README.md into a vectors folder: what the vectors are, and how to search them elsewhere."""
    meta = read_meta(folder)
    (folder / CARD_FILE).write_text(_card(meta, score, parity), encoding="utf-8")


def _card(meta: VectorsMeta, score: str, parity: dict[FileFormat, float]) -> str:
    files = "\n".join(
        f"| `vectors.{name}` | {_CONTENTS[name].format(dtype=meta.dtype)} | {value:.1e} |"
        for name, value in parity.items()
    )
    return f"""# Document vectors

{meta.num_docs:,} documents of the dataset `{meta.dataset_fingerprint}`, encoded by the model `{meta.model_checksum}`
(score: {score}).

A document's vector is [alpha * w, beta] (width {meta.width}), a query's is [u, 1]: **search by inner product**,
whatever the model's score, and append 1 to what the query tower gives. The inner product is the training score.
{_HOW_CODED.get(meta.dtype, "")}
| file | holds | largest difference from the model, relative |
|---|---|---|
{files}

Row i of every file is row i of `{DOCUMENTS_FILE}` (Arrow: doc_key, doc_title). `{META_FILE}` names model and dataset.
"""


def _write_fvecs(folder: Path, vectors: CodedVectors, path: Path) -> None:
    with path.open("wb") as file:
        for rows in vectors.pieces(ROWS_AT_ONCE):
            out = np.empty((len(rows), vectors.width + 1), "<f4")
            out[:, 0] = np.array([vectors.width], "<i4").view("<f4")
            out[:, 1:] = rows
            file.write(out.tobytes())


def _write_parquet(folder: Path, vectors: CodedVectors, path: Path) -> None:
    beside = [] if vectors.rows.dtype.fields is None else [pa.field(name, pa.float32()) for name in ("scale", "beta")]
    numbers = _numbers(vectors.rows[:0])
    listed = pa.list_(pa.from_numpy_dtype(numbers.dtype), numbers.shape[1])
    schema = pa.schema([("doc_key", pa.string()), ("doc_title", pa.string()), ("vector", listed), *beside])
    with pa.OSFile(str(folder / DOCUMENTS_FILE)) as file:
        documents = pa.ipc.open_file(file).read_all()
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(vectors), ROWS_AT_ONCE):
            rows, some = vectors.rows[first : first + ROWS_AT_ONCE], documents.slice(first, ROWS_AT_ONCE)
            flat = pa.array(np.ascontiguousarray(_numbers(rows)).reshape(-1))
            columns = [some["doc_key"], some["doc_title"], pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])]
            columns += [pa.array(np.ascontiguousarray(rows[field.name])) for field in beside]
            writer.write_table(pa.table(columns, schema=schema))


def _numbers(rows: np.ndarray) -> np.ndarray:
    """Return the numbers or codes of rows as they are stored, [n, …]."""
    return rows if rows.dtype.fields is None else rows["code"]


def _rows_of_parquet(file: parquet.ParquetFile, rows: np.ndarray, meta: VectorsMeta) -> np.ndarray:
    """Return some rows as vectors.npy has them, a row group at a time: the file may be larger than the memory."""
    element, shape = layout(meta.dtype, meta.width)
    found = np.empty((len(rows), *shape), element)
    beside = [] if element.fields is None else ["scale", "beta"]
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    groups = np.searchsorted(starts, rows, side="right") - 1
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        table = file.read_row_group(int(group), columns=["vector", *beside])
        wanted = table.take(pa.array(rows[places] - starts[group])).combine_chunks()
        numbers = np.asarray(wanted["vector"].combine_chunks().flatten()).reshape(len(places), -1)
        if beside:
            found["code"][places] = numbers
        else:
            found[places] = numbers
        for name in beside:
            found[name][places] = wanted[name].to_numpy()
    return found


_WRITERS: dict[str, Callable[[Path, CodedVectors, Path], None]] = {"fvecs": _write_fvecs, "parquet": _write_parquet}
_CONTENTS: dict[FileFormat, str] = {
    "npy": f'{{dtype}}, for numpy (`numpy.load("{VECTORS_FILE}", mmap_mode="r")`)',
    "fvecs": "per document an int32 width and float32 values",
    "parquet": "doc_key, doc_title, vector (fixed-size list of {dtype})",
}
_HOW_CODED: dict[Dtype, str] = {
    "int8": """
A row is (code, scale, beta), and the inner product scale * (u · code) + beta.
""",
    "binary": """
A row is (code, scale, beta). The code has a bit a dimension, the first one highest (numpy.packbits), s = 1 or -1 where
it is 1 or 0, and the inner product is scale * (u · s) + beta.
""",
}
