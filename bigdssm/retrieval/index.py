"""Folders of document vectors and of KNN indexes; each names the model whose vectors it holds.

VECTORS/  vectors.npy (float32 [N, D+1]), documents.arrow (doc_key, display), meta.json
INDEX/    index.faiss, documents.arrow, meta.json
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import faiss
import numpy as np
import pyarrow as pa
import torch
from numpy.lib.format import open_memmap

from bigdssm.data import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.retrieval.embed import Encoders, Progress, no_progress

IndexType = Literal["flat", "hnsw", "ivf"]
FORMAT = 1
META_FILE, DOCUMENTS_FILE, VECTORS_FILE, INDEX_FILE = "meta.json", "documents.arrow", "vectors.npy", "index.faiss"
ADD_ROWS = 65_536
HNSW_LINKS = 32


@dataclass(frozen=True)
class VectorsMeta:
    """Whose vectors they are."""

    kind: str  # vectors, or the index type
    model_checksum: str
    dataset_fingerprint: str
    num_docs: int
    width: int  # D+1
    format: int = FORMAT


@dataclass(frozen=True)
class Index:
    """An opened KNN index."""

    index: faiss.Index
    meta: VectorsMeta
    keys: pa.ChunkedArray  # string [N]
    display: pa.ChunkedArray

    def search(
        self, queries: np.ndarray, top: int, model_checksum: str, excluded: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32 [m, top], catalogue rows int64 [m, top]), best first; -inf and -1 behind the last.

        queries [m, D+1] are index vectors of the model `model_checksum`, `excluded` the catalogue rows to leave out.
        Raises CheckpointError where the index holds another model's vectors.
        """
        if model_checksum != self.meta.model_checksum:
            raise CheckpointError(
                f"the index holds vectors of model {self.meta.model_checksum[:12]}, the queries are of model "
                f"{model_checksum[:12]}; their scores would mean nothing: embed and index with the model in use"
            )
        excluded = np.unique(np.zeros(0, np.int64) if excluded is None else excluded)
        wanted = min(top + len(excluded), self.meta.num_docs)
        scores, rows = self.index.search(np.ascontiguousarray(queries, np.float32), wanted)
        out = np.isin(rows, excluded) | (rows < 0)
        order = np.argsort(out, axis=1, kind="stable")[:, :top]
        scores = np.where(out, np.float32(-np.inf), scores)
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(np.where(out, -1, rows), order, 1)
        pad = ((0, 0), (0, top - rows.shape[1]))
        return np.pad(scores, pad, constant_values=-np.inf), np.pad(rows, pad, constant_values=-1)


def write_vectors(
    folder: Path,
    encoders: Encoders,
    dataset: Dataset,
    model_checksum: str,
    *,
    rows_per_chunk: int = 1024,
    progress: Progress = no_progress,
) -> VectorsMeta:
    """Encode the whole catalogue into a vectors folder, chunk by chunk, and return its meta.

    Raises ConfigError where `folder` holds something else, DataError
    where a vector is not finite.
    """
    aside = _begin(folder)
    num_docs = dataset.catalogue.num_docs
    vectors: np.memmap | None = None
    for first in range(0, num_docs, rows_per_chunk):
        chunk = encoders.documents(np.arange(first, min(first + rows_per_chunk, num_docs))).cpu()
        if not bool(torch.isfinite(chunk).all()):
            raise DataError(f"the vectors of catalogue rows {first} and on hold NaN or inf; nothing was written")
        if vectors is None:
            vectors = open_memmap(aside / VECTORS_FILE, "w+", np.float32, (num_docs, chunk.shape[1]))
        vectors[first : first + len(chunk)] = chunk.numpy()
        progress("documents encoded", first + len(chunk), num_docs)
    if vectors is None:
        raise DataError(f"the catalogue of {dataset.dir} is empty")
    vectors.flush()
    _write_documents(aside / DOCUMENTS_FILE, dataset)
    meta = VectorsMeta("vectors", model_checksum, dataset.fingerprint, num_docs, vectors.shape[1])
    _finish(aside, folder, meta)
    return meta


def build_index(vectors_dir: Path, folder: Path, kind: IndexType = "flat") -> VectorsMeta:
    """Build the inner-product index of a vectors folder and return its meta.

    flat is exact; hnsw and ivf are approximate and faster on large catalogues. Raises CheckpointError where
    `vectors_dir` is not a whole vectors folder, ConfigError where `folder` holds something else.
    """
    meta = _read_meta(vectors_dir)
    if meta.kind != "vectors":
        raise CheckpointError(f"{vectors_dir} is an index; the vectors it was built from are needed")
    vectors = _load_vectors(vectors_dir, meta)
    aside = _begin(folder)
    index = _new_index(kind, vectors)
    for first in range(0, len(vectors), ADD_ROWS):
        index.add(np.ascontiguousarray(vectors[first : first + ADD_ROWS]))
    faiss.write_index(index, str(aside / INDEX_FILE))
    shutil.copyfile(vectors_dir / DOCUMENTS_FILE, aside / DOCUMENTS_FILE)
    built = VectorsMeta(kind, meta.model_checksum, meta.dataset_fingerprint, meta.num_docs, meta.width)
    _finish(aside, folder, built)
    return built


def open_index(folder: Path) -> Index:
    """Return the Index in `folder`. Raises CheckpointError where it is missing, damaged or no index."""
    meta = _read_meta(folder)
    if meta.kind not in get_args(IndexType):
        raise CheckpointError(f"{folder} holds {meta.kind}, not an index; run tools/build_index.py on it")
    try:
        index = faiss.read_index(str(folder / INDEX_FILE))
        with pa.OSFile(str(folder / DOCUMENTS_FILE)) as file:
            documents = pa.ipc.open_file(file).read_all()
    except (RuntimeError, OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(f"the index {folder} does not load: {' '.join(str(error).split())}") from None
    if index.ntotal != meta.num_docs or index.d != meta.width or documents.num_rows != meta.num_docs:
        raise CheckpointError(
            f"the index {folder} is damaged: {index.ntotal} vectors of width {index.d} and {documents.num_rows} "
            f"documents, {META_FILE} says {meta.num_docs} of width {meta.width}"
        )
    return Index(index, meta, documents["doc_key"], documents["display"])


def _new_index(kind: IndexType, vectors: np.ndarray) -> faiss.Index:
    num_docs, width = vectors.shape
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        return faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    num_lists = max(1, min(int(4 * num_docs**0.5), num_docs // 39))  # FAISS wants 39 training points a list
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_lists, faiss.METRIC_INNER_PRODUCT)
    sample = np.linspace(0, num_docs - 1, min(num_docs, 256 * num_lists)).astype(np.int64)
    index.train(np.ascontiguousarray(vectors[sample]))
    index.nprobe = max(1, num_lists // 8)
    return index


def _write_documents(path: Path, dataset: Dataset) -> None:
    schema = pa.schema([("doc_key", pa.string()), ("display", pa.string())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for first in range(0, dataset.catalogue.num_docs, ADD_ROWS):
            rows = np.arange(first, min(first + ADD_ROWS, dataset.catalogue.num_docs))
            columns = [dataset.catalogue.keys(rows), dataset.catalogue.display(rows)]
            writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], schema=schema))


def _load_vectors(folder: Path, meta: VectorsMeta) -> np.ndarray:
    try:
        vectors = open_memmap(folder / VECTORS_FILE, "r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / VECTORS_FILE} does not load: {error}") from None
    if vectors.shape != (meta.num_docs, meta.width):
        raise CheckpointError(f"{folder} is damaged: vectors of shape {vectors.shape}, {META_FILE} says otherwise")
    return vectors


def _read_meta(folder: Path) -> VectorsMeta:
    try:
        meta = VectorsMeta(**json.loads((folder / META_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} holds no {META_FILE}; it is neither vectors nor an index") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / META_FILE} is damaged: {error}") from None
    if meta.format != FORMAT:
        raise CheckpointError(f"{folder} has format {meta.format}, this version reads format {FORMAT}")
    return meta


def _begin(folder: Path) -> Path:
    """Return an empty folder beside `folder`, which must be free or one of ours."""
    if folder.exists() and not (folder / META_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and holds neither vectors nor an index; choose another --out")
    aside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _finish(aside: Path, folder: Path, meta: VectorsMeta) -> None:
    (aside / META_FILE).write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
