"""Folders of document vectors, which name their model: encoded in shards by any number of ranks, going on where killed.

VECTORS/   vectors.npy (`CodedVectors`, by default float32 [N, D+1]), documents.arrow (doc_key, doc_title), contents.npy
           (DOCUMENT [N]), meta.json (checksums of all of them and of itself)
.VECTORS.unfinished/   the same while it grows, see shards.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.lib.format import open_memmap

from bigdssm.checkpoints.checkpoint import check_file
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.ragged import Column, Ragged
from bigdssm.retrieval.embed import Encoders, cut_vectors
from bigdssm.retrieval.shards import ShardedFolder, ShardWork
from bigdssm.utils.array_file import new_array
from bigdssm.utils.atomic import real_path, write_json
from bigdssm.utils.hashing import file_checksum, json_checksum

FORMAT = 1
VECTORS = "vectors"
META_FILE, DOCUMENTS_FILE, VECTORS_FILE, CONTENTS_FILE = "meta.json", "documents.arrow", "vectors.npy", "contents.npy"
INDEX_FILE = "index.faiss"
DATA_SUFFIXES = (".npy", ".arrow", ".faiss")
ROWS_AT_ONCE = 65_536
DOCUMENT = np.dtype([("id", np.int64), ("content", np.uint64)])  # what a vector was made of


@dataclass(frozen=True)
class VectorsMeta:
    """Whose vectors they are."""

    kind: str  # vectors, or the index type
    model_checksum: str
    dataset_fingerprint: str
    num_docs: int
    width: int  # D+1, or of cut vectors, of which the last number is beta as well
    whole: int = 0  # D+1 where vectors are cut to `width`, as queries are then; 0: they are not
    score: str = ""  # dot or cosine: a cut vector of the latter gets its length again
    dtype: Dtype = "float32"  # what vectors.npy holds; of an index what it was built from
    rescored: int = 0  # of an index: candidates for each document asked for, which whole vectors score; 0: none
    options: dict[str, Any] = field(default_factory=dict)  # of the index type
    files: dict[str, str] = field(default_factory=dict)  # checksums by name, filled in by `write_meta`
    format: int = FORMAT


@dataclass(frozen=True)
class VectorsReport:
    """What a call of `write_vectors` did."""

    encoded: int  # documents
    reused: int  # documents whose vectors came from the earlier folder
    found: int  # shards that were finished before
    meta: VectorsMeta | None  # of the rank that put the folder in place; None on the others


def write_vectors(
    folder: Path,
    encoders: Encoders,
    dataset: Dataset,
    model_checksum: str,
    work: ShardWork | None = None,
    since: Path | None = None,
    *,
    whole: int = 0,
    score: str = "",
    dtype: Dtype = "float32",
) -> VectorsReport:
    """Encode this rank's share of the catalogue into a vectors folder; finished shards of an ended run are kept.

    `since` is an earlier vectors folder of the same model: documents that have not changed are copied from there.
    `whole`, `score` and `dtype` are of the meta: the width of the model's vectors where the encoders cut them, its
    score, and how vectors are written.
    Raises ConfigError where `folder` holds something else, CheckpointError where `since` is of another model, DataError
    where a vector is not finite, or too large for float16.
    """
    work, folder = work or ShardWork(), real_path(folder)
    num_docs = dataset.catalogue.num_docs
    if num_docs == 0:
        raise DataError(f"the catalogue of {dataset.dir} is empty")
    width = encoders.documents(np.zeros(1, np.int64)).shape[1]
    earlier = None if since is None else ReusableVectors(since, model_checksum, width, dtype)
    meta = VectorsMeta(VECTORS, model_checksum, dataset.fingerprint, num_docs, width, whole, score, dtype)
    element, shape = layout(dtype, width)
    check_free(folder, INDEX_FILE)

    def prepare(aside: Path) -> None:
        new_array(aside / VECTORS_FILE, element, (num_docs, *shape))
        new_array(aside / CONTENTS_FILE, DOCUMENT, (num_docs,))

    def complete(aside: Path) -> None:
        _write_documents(aside / DOCUMENTS_FILE, dataset)
        write_meta(aside, meta)

    shards = ShardedFolder(folder, asdict(meta), num_docs, work, prepare)
    vectors = open_memmap(shards.aside / VECTORS_FILE, "r+")
    contents = open_memmap(shards.aside / CONTENTS_FILE, "r+")
    encoded = reused = 0
    for _, first, last in shards.pending("shards encoded"):
        rows = np.arange(first, last)
        documents = _documents(dataset, rows)
        found = np.full(len(rows), -1) if earlier is None else earlier.find(documents)
        new = rows[found < 0]
        if len(new):
            made = encoders.documents(new).cpu()
            if not bool(torch.isfinite(made).all()):
                raise DataError(f"vectors of the catalogue rows {new[0]} to {new[-1]} hold NaN or inf; {folder} stays")
            vectors[new] = coded(made.numpy(), dtype)
            if dtype == "float16" and not np.isfinite(vectors[new]).all():
                raise DataError(f"vectors of the catalogue rows {new[0]} to {new[-1]} are too large for float16")
        if earlier is not None:
            vectors[rows[found >= 0]] = earlier.vectors.rows[found[found >= 0]]
        contents[rows] = documents
        vectors.flush()
        contents.flush()
        encoded, reused = encoded + len(new), reused + len(rows) - len(new)
    return VectorsReport(encoded, reused, shards.found, meta if shards.finish(complete) else None)


class ReusableVectors:
    """The vectors of an earlier catalogue, found by document and content."""

    def __init__(self, folder: Path, model_checksum: str, width: int, dtype: Dtype) -> None:
        """Raises CheckpointError: no vectors folder, a damaged one, or one of another model, width or dtype."""
        meta = read_meta(folder)
        if (meta.kind, meta.model_checksum) != (VECTORS, model_checksum):
            raise CheckpointError(
                f"{folder} holds {meta.kind} of model {meta.model_checksum[:12]}; --since needs vectors of the model "
                f"in use, {model_checksum[:12]}"
            )
        if (meta.width, meta.dtype) != (width, dtype):
            raise CheckpointError(
                f"{folder} holds vectors of {meta.width} numbers as {meta.dtype}, --since needs {width} as {dtype}"
            )
        self.vectors = load_vectors(folder, meta)
        contents = _load(folder, CONTENTS_FILE, meta)
        if contents.dtype != DOCUMENT or len(contents) != meta.num_docs:
            raise CheckpointError(f"{folder / CONTENTS_FILE} is damaged: it does not belong to these vectors")
        self._order = np.argsort(contents["id"], kind="stable")
        self._sorted = contents[self._order]

    def find(self, documents: np.ndarray) -> np.ndarray:
        """Return the rows of the vectors of DOCUMENT `documents`, int64; -1 where one is new or has changed."""
        place = np.searchsorted(self._sorted["id"], documents["id"])
        place = np.minimum(place, len(self._sorted) - 1)
        return np.where(self._sorted[place] == documents, self._order[place], -1)


def cut_like(vectors: np.ndarray, meta: VectorsMeta) -> np.ndarray:
    """Return index vectors float32 [n, D+1], cut to [n, meta.width] where the folder's are."""
    if vectors.shape[1] == meta.width:
        return vectors
    cut = cut_vectors(torch.from_numpy(np.array(vectors, np.float32)), meta.width - 1, meta.score == "cosine")
    return np.asarray(cut)


def vectors_of(
    folder: Path, model_checksum: str, dataset: Dataset, first: int = 0, last: int | None = None
) -> np.ndarray:
    """Return the vectors float32 [n, D+1] of the catalogue rows [first, last), by default all, in a vectors folder.

    Raises CheckpointError where they are another model's or another dataset's.
    """
    meta = read_meta(folder)
    if meta.kind != VECTORS:
        raise CheckpointError(f"{folder} is an index; give the folder of the vectors it was built from")
    for what, theirs, ours in (
        ("model", meta.model_checksum, model_checksum),
        ("dataset", meta.dataset_fingerprint, dataset.fingerprint),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"{folder} holds vectors of {what} {theirs[:12]}, needed are those of {ours[:12]}; embed it again"
            )
    return np.array(load_vectors(folder, meta)[first:last])


def load_vectors(folder: Path, meta: VectorsMeta) -> CodedVectors:
    """Return the vectors of a folder, mapped. Raises CheckpointError where they are not as `meta` says."""
    rows = _load(folder, VECTORS_FILE, meta)
    element, shape = layout(meta.dtype, meta.width)
    if rows.dtype != element or rows.shape != (meta.num_docs, *shape):
        raise CheckpointError(
            f"{folder} is damaged: vectors of {rows.dtype} and shape {rows.shape}, {META_FILE} says otherwise"
        )
    return CodedVectors(rows, meta.dtype, meta.width)


def read_meta(folder: Path) -> VectorsMeta:
    """Return the meta of a vectors or index folder. Raises CheckpointError: none there, damaged, of another format."""
    if (folder / META_FILE).exists() and not (folder / META_FILE).is_file():  # a pipe would be waited for
        raise CheckpointError(f"{folder / META_FILE} is damaged: it is no file")
    try:
        content = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {content['format']}, this version reads format {FORMAT}; embed and index again"
            )
        if content.pop("checksum") != json_checksum(content):
            raise CheckpointError(f"{folder / META_FILE} is damaged: its checksum is another; embed and index again")
        for name in ("files", "options"):
            if not isinstance(content[name], dict):
                raise TypeError(f"{name} is {content[name]!r}")
        return VectorsMeta(**content)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} holds no {META_FILE}; it is neither vectors nor an index") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / META_FILE} is damaged: {error!r}") from None


def check_free(folder: Path, other_file: str) -> None:
    """Raise ConfigError where `folder` holds what is not to be replaced: no vectors or index, or `other_file`."""
    if folder.exists() and not (folder / META_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and holds neither vectors nor an index; choose another --out")
    if (folder / other_file).exists():
        raise ConfigError(f"{folder} holds {other_file}, which this would replace; choose another --out")


def write_meta(folder: Path, meta: VectorsMeta) -> None:
    """Write the meta of a folder that is otherwise finished, checksums of its files included."""
    kept = sorted(path for path in folder.iterdir() if path.suffix in DATA_SUFFIXES)
    content = asdict(replace(meta, files={path.name: file_checksum(path) for path in kept}))
    write_json(folder / META_FILE, {**content, "checksum": json_checksum(content)})


def _documents(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return DOCUMENT [n]: the id of each document and a hash of its features."""
    columns = list(dataset.catalogue.columns(rows).values())
    documents = np.empty(len(rows), DOCUMENT)
    documents["id"] = dataset.catalogue.ids(rows)
    for i in range(len(rows)):
        digest = xxhash.xxh3_64()
        for column in columns:
            value = _bytes(column, i)
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)
        documents["content"][i] = digest.intdigest()
    return documents


def _bytes(column: Column, row: int) -> bytes:
    value = column[row] if isinstance(column, Ragged) else np.asarray(column)[row]
    return bytes(value.tobytes())


def _write_documents(path: Path, dataset: Dataset) -> None:
    schema = pa.schema([("doc_key", pa.string()), ("doc_title", pa.string())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for first in range(0, dataset.catalogue.num_docs, ROWS_AT_ONCE):
            rows = np.arange(first, min(first + ROWS_AT_ONCE, dataset.catalogue.num_docs))
            columns = [dataset.catalogue.keys(rows), dataset.catalogue.title(rows)]
            writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], schema=schema))


def _load(folder: Path, name: str, meta: VectorsMeta) -> np.ndarray:
    path = folder / name
    check_file(path, meta.files.get(name), META_FILE)
    try:
        return open_memmap(path, "r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} does not load: {error}") from None


Dtype = Literal["float32", "float16", "int8", "binary"]
LARGEST_CODE = 127


@dataclass(frozen=True)
class CodedVectors:
    """Vectors of a file or an array, float32 wherever some are asked for."""

    rows: np.ndarray  # as `coded` makes them, mapped where they are a file's
    dtype: Dtype
    width: int  # D+1

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return some vectors, float32 [n, D+1]; of float32 a slice is not copied."""
        return decoded(self.rows[rows], self.dtype, self.width)

    def pieces(self, size: int) -> Iterator[np.ndarray]:
        """Yield all vectors in their order, so many at once."""
        for first in range(0, len(self), size):
            yield self[first : first + size]


def layout(dtype: Dtype, width: int) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the type of a row's elements and the row's shape, for vectors [.., width]."""
    if dtype in ("float32", "float16"):
        return np.dtype(dtype), (width,)
    code = (np.int8, (width - 1,)) if dtype == "int8" else (np.uint8, (-(-(width - 1) // 8),))
    return np.dtype([("code", *code), ("scale", np.float32), ("beta", np.float32)]), ()


def coded(vectors: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return float32 vectors [n, D+1] as rows of `layout`; what float16 does not hold becomes infinite."""
    element, shape = layout(dtype, vectors.shape[1])
    if shape:
        with np.errstate(over="ignore"):
            return vectors.astype(element)
    rows, values = np.empty(len(vectors), element), vectors[:, :-1]
    magnitudes = np.abs(values)
    if dtype == "int8":
        rows["scale"] = magnitudes.max(axis=1) / LARGEST_CODE
        rows["code"] = np.rint(values / np.where(rows["scale"] > 0, rows["scale"], 1)[:, None])
    else:
        rows["scale"], rows["code"] = magnitudes.mean(axis=1), np.packbits(values >= 0, axis=1)
    rows["beta"] = vectors[:, -1]
    return rows


def decoded(rows: np.ndarray, dtype: Dtype, width: int) -> np.ndarray:
    """Return rows of `layout` as float32 [n, width]."""
    if dtype in ("float32", "float16"):
        return rows.astype(np.float32, copy=False)
    vectors = np.empty((len(rows), width), np.float32)
    if dtype == "int8":
        vectors[:, :-1] = rows["code"]
    else:
        vectors[:, :-1] = np.unpackbits(rows["code"], axis=1, count=width - 1) * np.float32(2) - 1
    vectors[:, :-1] *= rows["scale"][:, None]
    vectors[:, -1] = rows["beta"]
    return vectors


def bytes_per_vector(dtype: Dtype, width: int) -> int:
    """Return what a vector takes in a file."""
    element, shape = layout(dtype, width)
    return element.itemsize * int(np.prod(shape, dtype=np.int64))
