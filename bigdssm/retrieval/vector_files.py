"""Vectors files in formats of other engines, each checked against the model after writing.

vectors.fvecs     per document an int32 width and float32 values: FAISS, hnswlib, ann-benchmarks; float32 only
vectors.parquet   doc_key, doc_title, vector (list of float32 or float16, or a code of int8 or uint8 with its scale and
                  beta): Qdrant, Vespa, Elasticsearch, DuckDB, pandas
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

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
    WITHDRAWN,
    CodedVectors,
    Dtype,
    decode_rows,
    load_vectors,
    read_meta,
    row_layout,
)
from bigdssm.utils.atomic import new_file

FileFormat = Literal["npy", "fvecs", "parquet"]
CARD_FILE = "README.md"
CHECKED_ROWS = 256
# Largest difference relative to the vector's largest entry. int8 rounds to 1/254. binary stores signs and a scale: the
# relative error is at most 1, unless the sign of the largest entry is wrong.
PARITY_LIMITS: dict[Dtype, float] = {"float32": 1e-5, "float16": 1e-3, "int8": 5e-3, "binary": 1 + 1e-5}


_CONTENTS: dict[FileFormat, str] = {
    "npy": f'{{dtype}}, for numpy (`numpy.load("{VECTORS_FILE}", mmap_mode="r")`)',
    "fvecs": "per document an int32 width and float32 values",
    "parquet": "doc_key, doc_title, vector (fixed-size list of {dtype})",
}
_HEADS = {
    True: """A document's vector is [alpha * w, beta] (width {width}), a query's is [u, 1]: **search by inner product**,
for any score of the model. `encode_queries` and the exported towers return [u, 1]; append 1 only to a bare u.""",
    False: """A document's vector is alpha * w (width {width}), a query's is u, as `encode_queries` and the exported
towers return it: **search by inner product**, for any score of the model.""",
}
_HOW_CODED: dict[Dtype, str] = {
    "int8": """
A row is (code, scale, beta), and the inner product scale * (u · code) + beta; models without beta have none.
""",
    "binary": """
A row is (code, scale, beta); models without beta have none. The code has one bit per dimension, the first one highest
(numpy.packbits); s is 1 for a set bit and -1 otherwise, and the inner product is scale * (u · s) + beta.
""",
}


def check_formats(dtype: Dtype, targets: Iterable[FileFormat]) -> None:
    """Raise ConfigError if a format cannot store vectors of this dtype."""
    if dtype != "float32" and "fvecs" in targets:
        raise ConfigError(f"--format fvecs --dtype {dtype}: fvecs holds float32 only; use parquet")


def formats_in(folder: Path) -> list[FileFormat]:
    """Return the formats of the files of a vectors folder."""
    return [name for name in get_args(FileFormat) if (folder / f"vectors.{name}").exists()]


def write_file(folder: Path, target: FileFormat) -> Path:
    """Write the vectors of a vectors folder to a file of the format `target` in it; npy already exists."""
    meta = read_meta(folder)
    check_formats(meta.dtype, [target])
    path = folder / f"vectors.{target}"
    if target != "npy":
        with new_file(path) as temporary:
            write = _write_fvecs if target == "fvecs" else _write_parquet
            write(folder, load_vectors(folder, meta), temporary)
    return path


def difference_from_model(path: Path, encoders: Encoders) -> float:
    """Return the largest relative difference between the vectors of a file and the model's.

    A sample of evenly spaced documents is encoded. Raises CheckpointError: above the dtype's PARITY_LIMITS.
    """
    meta = read_meta(path.parent)
    rows = np.unique(np.linspace(0, meta.num_docs - 1, CHECKED_ROWS).astype(np.int64))
    written, expected = read_rows(path, rows), encoders.documents(rows).cpu().numpy()
    limit = PARITY_LIMITS[meta.dtype]
    scale = np.abs(expected).max(axis=1).clip(min=np.finfo(np.float32).tiny)
    difference = float((np.abs(written - expected).max(axis=1) / scale).max())
    if not difference <= limit:
        raise CheckpointError(
            f"{path} does not match the model: its vectors differ by {difference:.1e}, needs at most {limit:.0e}; "
            "encode again into an empty --out"
        )
    return difference


def read_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """Read the given rows of a vectors file of any format, float32 [n, D+1]."""
    meta = read_meta(path.parent)
    if path.suffix == ".npy":
        return decode_rows(
            np.load(path, mmap_mode="r", allow_pickle=False)[rows], meta.dtype, meta.width, meta.has_beta
        )
    if path.suffix == ".fvecs":
        width = int(np.fromfile(path, np.int32, 1)[0])
        rows_of_file = np.memmap(path, np.float32, "r").reshape(-1, width + 1)
        return np.asarray(rows_of_file[rows, 1:])
    with parquet.ParquetFile(path) as file:
        # One row group at a time, in the layout of vectors.npy: the file may exceed the memory.
        element, shape = row_layout(meta.dtype, meta.width, meta.has_beta)
        stored = np.empty((len(rows), *shape), element)
        extra = (element.names or ())[1:]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = np.searchsorted(starts, rows, side="right") - 1
        for group in np.unique(groups):
            positions = np.flatnonzero(groups == group)
            table = file.read_row_group(int(group), columns=["vector", *extra])
            selected = table.take(pa.array(rows[positions] - starts[group])).combine_chunks()
            numbers = np.asarray(selected["vector"].combine_chunks().flatten()).reshape(len(positions), -1)
            if extra:
                stored["code"][positions] = numbers
            else:
                stored[positions] = numbers
            for name in extra:
                stored[name][positions] = selected[name].to_numpy()
    return decode_rows(stored, meta.dtype, meta.width, meta.has_beta)


def write_card(folder: Path, score: str, parity: dict[FileFormat, float]) -> None:
    """Write README.md into a vectors folder: the vectors' origin and how to search them in other engines."""
    meta = read_meta(folder)
    files = "\n".join(
        f"| `vectors.{name}` | {_CONTENTS[name].format(dtype=meta.dtype)} | {value:.1e} |"
        for name, value in parity.items()
    )
    card = f"""# Document vectors

{meta.num_docs:,} documents of the dataset `{meta.dataset_fingerprint}`, encoded by the model `{meta.model_checksum}`
(score: {score}).

{_HEADS[meta.has_beta].format(width=meta.width)} The inner product is the training score.
{_HOW_CODED.get(meta.dtype, "")}
| file | holds | largest difference from the model, relative |
|---|---|---|
{files}

Row i of every file is row i of `{DOCUMENTS_FILE}` (Arrow: doc_key, doc_title, and `{WITHDRAWN}` if documents are: leave
them out of results). `{META_FILE}` names model and dataset.
"""
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _write_fvecs(folder: Path, vectors: CodedVectors, path: Path) -> None:
    with path.open("wb") as file:
        for rows in vectors.chunks(ROWS_AT_ONCE):
            out = np.empty((len(rows), vectors.width + 1), "<f4")
            out[:, 0] = np.array([vectors.width], "<i4").view("<f4")
            out[:, 1:] = rows
            file.write(out.tobytes())


def _write_parquet(folder: Path, vectors: CodedVectors, path: Path) -> None:
    extra = [pa.field(name, pa.float32()) for name in (vectors.rows.dtype.names or ())[1:]]
    numbers = _numbers(vectors.rows[:0])
    vector = pa.list_(pa.from_numpy_dtype(numbers.dtype), numbers.shape[1])
    with pa.OSFile(str(folder / DOCUMENTS_FILE)) as file:
        documents = pa.ipc.open_file(file).read_all()
    withdrawn = [field for field in documents.schema if field.name == WITHDRAWN]
    schema = pa.schema([("doc_key", pa.string()), ("doc_title", pa.string()), ("vector", vector), *extra, *withdrawn])
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, len(vectors), ROWS_AT_ONCE):
            rows, titled = vectors.rows[first : first + ROWS_AT_ONCE], documents.slice(first, ROWS_AT_ONCE)
            flat = pa.array(np.ascontiguousarray(_numbers(rows)).reshape(-1))
            columns = [
                titled["doc_key"],
                titled["doc_title"],
                pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1]),
            ]
            columns += [pa.array(np.ascontiguousarray(rows[field.name])) for field in extra]
            columns += [titled[field.name] for field in withdrawn]
            writer.write_table(pa.table(columns, schema=schema))


def _numbers(rows: np.ndarray) -> np.ndarray:
    """Return the stored numbers or codes of rows, [n, …]."""
    return rows if rows.dtype.fields is None else rows["code"]
