"""Vectors folders: document vectors of a model, encoded in resumable shards by any number of ranks.

VECTORS/   vectors.npy (`CodedVectors`, by default float32 [N, D+1]), documents.arrow (doc_key, doc_title), contents.npy
           (DOCUMENT [N]), meta.json (checksums of all of them and of itself)
.VECTORS.unfinished/   the same while it grows, see shards.py
"""

import json
from collections.abc import Callable, Iterator
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
from bigdssm.dataset.schema import find_sorted
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.ragged import Ragged
from bigdssm.retrieval.embed import Encoders, truncate_vectors
from bigdssm.retrieval.shards import ShardedFolder, ShardWork
from bigdssm.stores.base import Collection
from bigdssm.utils.array_file import new_array
from bigdssm.utils.atomic import check_replaceable, hidden_version, real_path, write_json
from bigdssm.utils.hashing import file_checksum, json_checksum

Dtype = Literal["float32", "float16", "int8", "binary"]
LARGEST_CODE = 127  # of int8
FORMAT = 1
VECTORS = "vectors"
META_FILE, DOCUMENTS_FILE, VECTORS_FILE, CONTENTS_FILE = "meta.json", "documents.arrow", "vectors.npy", "contents.npy"
INDEX_FILE = "index.faiss"
OWN_FILES = (META_FILE, DOCUMENTS_FILE, CONTENTS_FILE, INDEX_FILE, "vectors.*", "README.md")  # of vectors and indexes
WITHDRAWN = "withdrawn"  # a column of documents.arrow, bool, if any document is withdrawn
DATA_SUFFIXES = (".npy", ".arrow", ".faiss")
ROWS_AT_ONCE = 65_536
DOCUMENT = np.dtype([("id", np.int64), ("content", np.uint64)])  # identifies the encoded features of a document


@dataclass(frozen=True)
class VectorsMeta:
    """Metadata of a vectors or index folder (meta.json)."""

    kind: str  # vectors, or the index type
    model_checksum: str
    dataset_fingerprint: str
    num_docs: int
    width: int  # stored width: D+1 (D without beta), or less if truncated
    whole: int = 0  # D+1 before truncation (queries are truncated alike); 0: not truncated
    score: str = ""  # dot or cosine; a truncated cosine vector is rescaled to its norm
    dtype: Dtype = "float32"  # of vectors.npy; of an index: of the vectors that it was built from
    rescored: int = 0  # of an index: candidates per requested document that full vectors rescore; 0: none
    has_beta: bool = True  # whether the last number is beta
    options: dict[str, Any] = field(default_factory=dict)  # of the index type
    files: dict[str, str] = field(default_factory=dict)  # checksums by name, set by `write_meta`
    format: int = FORMAT


@dataclass(frozen=True)
class VectorsReport:
    """Result of `write_vectors`."""

    encoded: int  # documents
    reused: int  # documents whose vectors were copied from the earlier folder
    resumed_shards: int  # finished by an earlier run
    meta: VectorsMeta | None  # on the rank that finished the folder; None on the others


def write_vectors(
    folder: Path,
    encoders: Encoders,
    dataset: Dataset,
    model_checksum: str,
    work: ShardWork | None = None,
    since: Path | None = None,
    *,
    full_width: int = 0,
    score: str = "",
    dtype: Dtype = "float32",
    overwrite: bool = False,
    complete: Callable[[Path], None] = lambda temporary: None,
) -> VectorsReport:
    """Encode this rank's share of the catalogue into a vectors folder, resuming finished shards.

    `since` is an earlier vectors folder of the same model: vectors of unchanged documents are copied from it.
    `full_width`, `score` and `dtype` are stored in the meta: width before truncation, score type, storage type.
    overwrite: `folder` may hold something else; files with other names than these are kept.
    `complete` adds files to the folder before it gets its name, on the rank that finishes it.
    Raises: ConfigError: `folder` holds something else; CheckpointError: `since` is of another model; DataError: a
    vector is not finite, or too large for float16.
    """
    work, folder = work or ShardWork(), real_path(folder)
    num_docs = dataset.catalogue.num_docs
    if num_docs == 0:
        raise DataError(f"the catalogue of {dataset.dir} is empty")
    width = encoders.documents(np.zeros(1, np.int64)).shape[1]
    earlier = None if since is None else ReusableVectors(since, model_checksum, width, dtype)
    has_beta = encoders.has_beta
    meta = VectorsMeta(
        VECTORS, model_checksum, dataset.fingerprint, num_docs, width, full_width, score, dtype, has_beta=has_beta
    )
    element, shape = row_layout(dtype, width, has_beta)
    check_output_folder(folder, INDEX_FILE, overwrite)

    def prepare(temporary: Path) -> None:
        new_array(temporary / VECTORS_FILE, element, (num_docs, *shape))
        new_array(temporary / CONTENTS_FILE, DOCUMENT, (num_docs,))

    def finish(temporary: Path) -> None:
        withdrawn = np.zeros(num_docs, bool)
        withdrawn[dataset.catalogue.withdrawn] = True
        schema = pa.schema([("doc_key", pa.string()), ("doc_title", pa.string())])
        if withdrawn.any():
            schema = schema.append(pa.field(WITHDRAWN, pa.bool_()))
        with pa.OSFile(str(temporary / DOCUMENTS_FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for first in range(0, num_docs, ROWS_AT_ONCE):
                rows = np.arange(first, min(first + ROWS_AT_ONCE, num_docs))
                columns = [dataset.catalogue.keys(rows), dataset.catalogue.titles(rows), withdrawn[rows]]
                writer.write_table(pa.table(columns[: len(schema)], schema=schema))
        write_meta(temporary, meta)
        complete(temporary)

    shards = ShardedFolder(folder, asdict(meta), num_docs, work, prepare, OWN_FILES)
    vectors = open_memmap(shards.aside / VECTORS_FILE, "r+")
    contents = open_memmap(shards.aside / CONTENTS_FILE, "r+")
    encoded = reused = 0
    for _, first, last in shards.pending("shards encoded"):
        rows = np.arange(first, last)
        documents = _documents(dataset, rows)
        earlier_rows = np.full(len(rows), -1) if earlier is None else earlier.find(documents)
        new = rows[earlier_rows < 0]
        if len(new):
            vectors_of_new = encoders.documents(new).cpu()
            if not bool(torch.isfinite(vectors_of_new).all()):
                raise DataError(f"vectors of the catalogue rows {new[0]} to {new[-1]} hold NaN or inf; {folder} stays")
            vectors[new] = encode_rows(vectors_of_new.numpy(), dtype, has_beta)
            if dtype == "float16" and not np.isfinite(vectors[new]).all():
                raise DataError(f"vectors of the catalogue rows {new[0]} to {new[-1]} are too large for float16")
        if earlier is not None:
            vectors[rows[earlier_rows >= 0]] = earlier.vectors.rows[earlier_rows[earlier_rows >= 0]]
        contents[rows] = documents
        vectors.flush()
        contents.flush()
        encoded, reused = encoded + len(new), reused + len(rows) - len(new)
    return VectorsReport(encoded, reused, shards.resumed, meta if shards.finish(finish) else None)


class ReusableVectors:
    """Vectors of an earlier catalogue, looked up by document id and content hash."""

    def __init__(self, folder: Path, model_checksum: str, width: int, dtype: Dtype) -> None:
        """Raises CheckpointError: not a vectors folder, damaged, or of another model, width or dtype."""
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
            raise CheckpointError(f"{folder / CONTENTS_FILE} is damaged: it does not match these vectors")
        self._order = np.argsort(contents["id"], kind="stable")
        self._sorted = contents[self._order]

    def find(self, documents: np.ndarray) -> np.ndarray:
        """Return the vector rows of DOCUMENT records, int64; -1 if a document is new or changed."""
        position, _ = find_sorted(self._sorted["id"], documents["id"])
        return np.where(self._sorted[position] == documents, self._order[position], -1)


def truncate_like(vectors: np.ndarray, meta: VectorsMeta | Collection) -> np.ndarray:
    """Return index vectors float32 [n, D+1], truncated to [n, meta.width]."""
    if vectors.shape[1] == meta.width:
        return vectors
    full, width = torch.from_numpy(np.array(vectors, np.float32)), meta.width - meta.has_beta
    return np.asarray(truncate_vectors(full, width, meta.score == "cosine", meta.has_beta))


def read_vectors(
    folder: Path, model_checksum: str, dataset: Dataset, first: int = 0, last: int | None = None, width: int = 0
) -> np.ndarray:
    """Read vectors float32 [n, D+1] of catalogue rows [first, last) (default: all) of a folder.

    Raises CheckpointError: vectors of another model or dataset.
    """
    return np.array(open_vectors(folder, model_checksum, dataset, width)[first:last])


def open_vectors(folder: Path, model_checksum: str, dataset: Dataset, width: int = 0) -> "CodedVectors":
    """Memory-map the vectors of a model and dataset. Raises CheckpointError: of another one, or of another `width`."""
    meta = read_meta(folder)
    if meta.kind != VECTORS:
        raise CheckpointError(f"{folder} is an index; give the folder of the vectors it was built from")
    for what, theirs, ours in (
        ("model", meta.model_checksum, model_checksum),
        ("dataset", meta.dataset_fingerprint, dataset.fingerprint),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"{folder} holds vectors of {what} {theirs[:12]}, needs those of {ours[:12]}; embed it again"
            )
    if meta.whole and meta.whole != meta.width:
        raise CheckpointError(
            f"{folder} holds the first {meta.width - meta.has_beta} of {meta.whole - meta.has_beta} numbers of each "
            "vector, needs all; embed without --width"
        )
    if width and meta.width != width:  # earlier versions stored a beta of 0
        raise CheckpointError(f"{folder} holds vectors of width {meta.width}, needs {width}; embed it again")
    return load_vectors(folder, meta)


def load_vectors(folder: Path, meta: VectorsMeta) -> "CodedVectors":
    """Memory-map the vectors of a folder. Raises CheckpointError: they do not match `meta`."""
    rows = _load(folder, VECTORS_FILE, meta)
    element, shape = row_layout(meta.dtype, meta.width, meta.has_beta)
    if rows.dtype != element or rows.shape != (meta.num_docs, *shape):
        raise CheckpointError(
            f"{folder} is damaged: vectors of {rows.dtype} and shape {rows.shape} do not match {META_FILE}"
        )
    return CodedVectors(rows, meta.dtype, meta.width, meta.has_beta)


def read_meta(folder: Path) -> VectorsMeta:
    """Read the meta of a vectors or index folder. Raises CheckpointError: missing, damaged, or another format."""
    if (folder / META_FILE).exists() and not (folder / META_FILE).is_file():  # reading a pipe would block
        raise CheckpointError(f"{folder / META_FILE} is damaged: it is not a file")
    try:
        content = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {content['format']}, this version reads format {FORMAT}; embed and index again"
            )
        if content.pop("checksum") != json_checksum(content):
            raise CheckpointError(f"{folder / META_FILE} is damaged: its checksum differs; embed and index again")
        for name in ("files", "options"):
            if not isinstance(content[name], dict):
                raise TypeError(f"{name} is {content[name]!r}")
        return VectorsMeta(**content)
    except (FileNotFoundError, NotADirectoryError):
        hint = hidden_version(folder)
        raise CheckpointError(f"{folder} holds no {META_FILE}; it is neither vectors nor an index{hint}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / META_FILE} is damaged: {error!r}") from None


def check_output_folder(folder: Path, other_file: str, overwrite: bool) -> None:
    """Raise ConfigError if writing to `folder` would replace foreign content, or the file `other_file`."""
    check_replaceable(
        folder,
        META_FILE,
        lambda meta: "dataset_fingerprint" in meta,
        "holds neither vectors nor an index",
        overwrite=overwrite,
    )
    if not overwrite and (folder / other_file).exists():
        raise ConfigError(f"{folder} holds {other_file}, which this would replace; choose another one or --overwrite")


def write_meta(folder: Path, meta: VectorsMeta) -> None:
    """Write the meta, with checksums of the data files, into an otherwise finished folder."""
    data_files = sorted(path for path in folder.iterdir() if path.suffix in DATA_SUFFIXES)
    content = asdict(replace(meta, files={path.name: file_checksum(path) for path in data_files}))
    write_json(folder / META_FILE, {**content, "checksum": json_checksum(content)})


def _documents(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return DOCUMENT [n]: id and feature hash per document."""
    columns = list(dataset.catalogue.columns(rows).values())
    documents = np.empty(len(rows), DOCUMENT)
    documents["id"] = dataset.catalogue.ids(rows)
    for i in range(len(rows)):
        digest = xxhash.xxh3_64()
        for column in columns:
            value = (column[i] if isinstance(column, Ragged) else np.asarray(column)[i]).tobytes()
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)
        documents["content"][i] = digest.intdigest()
    return documents


def _load(folder: Path, name: str, meta: VectorsMeta) -> np.ndarray:
    path = folder / name
    check_file(path, meta.files.get(name), META_FILE)
    try:
        return open_memmap(path, "r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} does not load: {error}") from None


@dataclass(frozen=True)
class CodedVectors:
    """Stored vectors of any Dtype, decoded to float32 on access."""

    rows: np.ndarray  # of `encode_rows`; memory-mapped if read from a file
    dtype: Dtype
    width: int  # D+1
    has_beta: bool = True  # else D

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return vectors as float32 [n, D+1]; a slice of float32 is not copied."""
        return decode_rows(self.rows[rows], self.dtype, self.width, self.has_beta)

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yield all vectors in order, in chunks of `size`."""
        for first in range(0, len(self), size):
            yield self[first : first + size]


def row_layout(dtype: Dtype, width: int, has_beta: bool = True) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the element type and the shape of a stored row of vectors [.., width]."""
    if dtype in ("float32", "float16"):
        return np.dtype(dtype), (width,)
    numbers = width - has_beta
    code = (np.int8, (numbers,)) if dtype == "int8" else (np.uint8, (-(-numbers // 8),))
    names = ["scale", "beta"] if has_beta else ["scale"]
    return np.dtype([("code", *code), *((name, np.float32) for name in names)]), ()


def encode_rows(vectors: np.ndarray, dtype: Dtype, has_beta: bool = True) -> np.ndarray:
    """Encode float32 vectors [n, D+1] as rows of `row_layout`; values beyond float16 become infinite."""
    element, shape = row_layout(dtype, vectors.shape[1], has_beta)
    if shape:
        with np.errstate(over="ignore"):
            return vectors.astype(element)
    rows, values = np.empty(len(vectors), element), vectors[:, : vectors.shape[1] - has_beta]
    magnitudes = np.abs(values)
    if dtype == "int8":
        rows["scale"] = magnitudes.max(axis=1) / LARGEST_CODE
        rows["code"] = np.rint(values / np.where(rows["scale"] > 0, rows["scale"], 1)[:, None])
    else:
        rows["scale"], rows["code"] = magnitudes.mean(axis=1), np.packbits(values >= 0, axis=1)
    if has_beta:
        rows["beta"] = vectors[:, -1]
    return rows


def decode_rows(rows: np.ndarray, dtype: Dtype, width: int, has_beta: bool = True) -> np.ndarray:
    """Decode rows of `row_layout` to float32 [n, width]."""
    if dtype in ("float32", "float16"):
        return rows.astype(np.float32, copy=False)
    vectors = np.empty((len(rows), width), np.float32)
    values = vectors[:, : width - has_beta]
    if dtype == "int8":
        values[:] = rows["code"]
    else:
        values[:] = np.unpackbits(rows["code"], axis=1, count=values.shape[1]) * np.float32(2) - 1
    values *= rows["scale"][:, None]
    if has_beta:
        vectors[:, -1] = rows["beta"]
    return vectors
