"""Vectors folders: document vectors of a model, encoded in resumable shards by any number of ranks.

VECTORS/   vectors.npy (`CodedVectors`, by default float32 [N, D+1]), documents.arrow (doc_key, doc_title), contents.npy
           (DOCUMENT [N]), meta.json (checksums of all of them and of itself)
.VECTORS.unfinished/   the same while it grows, see shards.py

Files in formats of other engines, each checked against the model after writing:

vectors.fvecs     per document an int32 width and float32 values: FAISS, hnswlib, ann-benchmarks; float32 only
vectors.parquet   doc_key, doc_title, vector (list of float32 or float16, or a code of int8 or uint8 with its scale and
                  beta): Qdrant, Vespa, Elasticsearch, DuckDB, pandas
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.lib.format import open_memmap
from pyarrow import parquet

from bigdssm.checkpoints.checkpoint import check_file
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import find_sorted
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.ragged import Ragged
from bigdssm.retrieval.embed import Encoders, truncate_vectors
from bigdssm.retrieval.shards import WHOLE_FOLDER, ShardedFolder, Share
from bigdssm.stores.base import Collection
from bigdssm.utils.array_file import new_array, open_arrow
from bigdssm.utils.atomic import check_replaceable, hidden_version, new_file, real_path, write_json
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
    work: Share = WHOLE_FOLDER,
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
    folder = real_path(folder)
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
            vectors[new] = encode_rows(vectors_of_new.cpu().numpy(), dtype, has_beta)
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
    if target == "npy":
        return path
    vectors = load_vectors(folder, meta)
    if target == "fvecs":
        with new_file(path) as temporary, temporary.open("wb") as file:
            for rows in vectors.chunks(ROWS_AT_ONCE):
                out = np.empty((len(rows), vectors.width + 1), "<f4")
                out[:, 0] = np.array([vectors.width], "<i4").view("<f4")
                out[:, 1:] = rows
                file.write(out.tobytes())
        return path

    # The numbers of a row, or its code with scale and beta, between key and title of the document and `withdrawn`.
    extra = [pa.field(name, pa.float32()) for name in (vectors.rows.dtype.names or ())[1:]]
    numbers = _numbers(vectors.rows[:0])
    vector = pa.list_(pa.from_numpy_dtype(numbers.dtype), numbers.shape[1])
    documents = open_arrow(folder / DOCUMENTS_FILE).read_all()
    withdrawn = [field for field in documents.schema if field.name == WITHDRAWN]
    schema = pa.schema([("doc_key", pa.string()), ("doc_title", pa.string()), ("vector", vector), *extra, *withdrawn])
    with new_file(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for first in range(0, len(vectors), ROWS_AT_ONCE):
            stored, titled = vectors.rows[first : first + ROWS_AT_ONCE], documents.slice(first, ROWS_AT_ONCE)
            flat = pa.array(np.ascontiguousarray(_numbers(stored)).reshape(-1))
            columns = [
                titled["doc_key"],
                titled["doc_title"],
                pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1]),
            ]
            columns += [pa.array(np.ascontiguousarray(stored[field.name])) for field in extra]
            columns += [titled[field.name] for field in withdrawn]
            writer.write_table(pa.table(columns, schema=schema))
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


def _numbers(rows: np.ndarray) -> np.ndarray:
    """Return the stored numbers or codes of rows, [n, …]."""
    return rows if rows.dtype.fields is None else rows["code"]
