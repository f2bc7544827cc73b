"""A folder of FAISS indexes as a store: file:///FOLDER.

FOLDER/NAME/            a collection: an index folder as `build_index` writes it (`index.py`), whose documents.arrow
                        also has doc_version, doc_content and filter.COLUMN, with vectors.npy, tombstones.npy (hash of
                        the key, version) and collection.json (a `Collection`)
FOLDER/.NAME.changes/   writes and deletes that `finish` has not applied yet, an Arrow file each
FOLDER/.NAME.dropped/   a dropped collection that is being removed
FOLDER/ALIAS            a link to a collection; the link .ALIAS.previous names the one before

Changes are collected, and `finish` builds the index aside and exchanges the folders, so readers have the old collection
or the new one, also after a kill. `IndexBackend` is the search structure inside a collection; a store has collections,
aliases, versions and filters.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features import Categorical, Column, Feature, Numeric, Vocabulary
from bigdssm.features.base import FITTED, ColumnType, encode_values
from bigdssm.features.categorical import UNKNOWN
from bigdssm.features.conditions import Expression, conditions, evaluate
from bigdssm.retrieval.index import index_meta, open_index
from bigdssm.retrieval.index_types import INDEX_TYPES, AllowedDocuments
from bigdssm.retrieval.vectors import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    META_FILE,
    VECTORS,
    VECTORS_FILE,
    CodedVectors,
    VectorsMeta,
    read_meta,
    write_meta,
)
from bigdssm.stores.base import Alias, Collection, Documents, ScoredDocument, Store, StoredVector, register_store
from bigdssm.utils.array_file import open_arrow
from bigdssm.utils.atomic import (
    WriterLock,
    lock_path,
    new_file,
    new_folder,
    recover,
    remove,
    sync,
    temporary_path,
    write_json,
)
from bigdssm.utils.components import bounded
from bigdssm.utils.hashing import hash64

COLLECTION_FILE, TOMBSTONES_FILE = "collection.json", "tombstones.npy"
CHANGES, DROPPED = ".changes", ".dropped"
TOMBSTONE = np.dtype([("id", np.int64), ("version", np.int64)])
NAME_BYTES = 200
CACHED_FILTERS = 32
OPENING_ATTEMPTS = 3
LOCK_WAIT_S = 5.0  # for a publisher that was killed, or ends
COLUMN = "filter."  # prefix of a filter's column, which `open_index` ignores
TYPES: Mapping[ColumnType, pa.DataType] = {
    "category": pa.string(), "categories": pa.list_(pa.string()), "number": pa.float32(),
}  # fmt: skip


@register_store
@dataclass(frozen=True)
class FolderStore(Store):
    """Index folders on this machine."""

    scheme: ClassVar[str] = "file"

    type: str = "flat"  # of the index, as in `bigdssm build_index`
    rescore: int = bounded(0, 0, 10_000)  # candidates per requested document to rescore with exact vectors
    index: dict[str, Any] = field(default_factory=dict)  # options of the type, as in index.search_width=400
    _opened: Any = field(default_factory=dict, metadata=FITTED, repr=False, compare=False)  # `_Opened` by path

    # ----- collections

    def options(self, existing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keep the options of an existing collection unless its type changes; those of the type one by one."""
        options = super().options(existing)
        if existing is None or options["type"] != existing["type"]:
            return {**super().options(), "type": options["type"]}
        return {**options, "index": {**existing["index"], **self.index}}

    @cached_property
    def root(self) -> Path:
        """The folder of collections. Raises ConfigError: a relative path, or another machine."""
        parts = urlsplit(self.url)
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not path.is_absolute():
            raise ConfigError(
                f"got the store {self.url}, needs the absolute path of a folder here: file:///srv/vectors"
            )
        return path

    def collections(self) -> dict[str, Collection]:
        """Return all collections by name."""
        files = self.root.glob(f"[!.]*/{COLLECTION_FILE}") if self.root.is_dir() else ()
        folders = sorted(file.parent for file in files if not file.parent.is_symlink())
        return {folder.name: _collection_of(folder) for folder in folders}

    def create(self, collection: Collection) -> None:
        """Create an empty index folder, or replace the description of an existing collection."""
        name = collection.name
        self._check_name(name)
        self.check_new_collection(name)
        if (self.root / name).is_symlink():
            raise ConfigError(f"collection {name}: it is the name of an alias; choose another one")
        existing = self.collections().get(name)
        if existing is None:
            columns = {f"{COLUMN}{column}": TYPES[type] for column, type in collection.columns.items()}
            documents = pa.schema({
                "doc_key": pa.string(), "doc_title": pa.string(), "doc_version": pa.int64(), "doc_content": pa.int64(),
                **columns,
            }).empty_table()  # fmt: skip
            vectors = np.zeros((0, collection.width), np.float32)
            remove(self._changes(name))  # of a dropped collection, left by a kill
            self._build(collection, documents, vectors, np.zeros(0, TOMBSTONE))
        elif (existing.model, existing.columns) != (collection.model, collection.columns):
            raise ConfigError(f"collection {name} has another model or other columns; choose another name")
        else:
            write_json(self.root / name / COLLECTION_FILE, asdict(collection))

    @contextmanager
    def publishing(self, name: str) -> Iterator[None]:
        """Hold a lock file, which the system releases when the process ends."""
        self._check_name(name)
        self.root.mkdir(parents=True, exist_ok=True)
        folder, until = self.root / name, time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                lock = WriterLock(lock_path(folder), folder)
                break
            except DataError:
                if time.monotonic() > until:
                    raise DataError(
                        f"{self.root}: another process publishes to {name}; wait for it, then try again"
                    ) from None
                time.sleep(0.1)
        with lock:
            recover(folder)
            yield

    def finish(self, collection: Collection) -> None:
        """Apply all changes and build the index aside, if there are changes or other options; record the time."""
        folder = self._folder(collection)
        rows, built = self._rows(collection.name), read_meta(folder)
        collection, meta = replace(collection, published=time.time()), _meta(collection, built.num_docs)
        if rows.changes or (built.kind, built.options, built.rescored) != (meta.kind, meta.options, meta.rescored):
            self._build(collection, *rows.merged())
        else:
            write_json(folder / COLLECTION_FILE, asdict(collection))
        for path in rows.changes:
            path.unlink(missing_ok=True)

    def compact(self, collection: Collection) -> Sequence[str]:
        """Apply all changes: a new index has no deleted document. Remove the leftovers of killed commands."""
        rows = self._rows(self._folder(collection).name)
        if rows.changes:
            self._build(collection, *rows.merged())
            for path in rows.changes:
                path.unlink(missing_ok=True)
        for path in self._changes(collection.name).glob(".*"):  # unfinished ones
            remove(path)
        for path in self.root.glob(f".*{DROPPED}"):
            with suppress(FileNotFoundError):  # its `drop` goes on
                remove(path)
        for path in self.root.glob(f".*{CHANGES}"):
            self._remove_if_dropped(path.name[1 : -len(CHANGES)], [path])
        return [f"{self.root / collection.name / TOMBSTONES_FILE}, which has a 64-bit hash of each removed key"]

    def drop(self, name: str) -> None:
        """Remove the folders of a collection, and the leftovers of a killed command."""
        self._check_name(name)
        self.check_unnamed(name)
        folder, dropped = self.root / name, self.root / f".{name}{DROPPED}"
        if name in self.collections():
            remove(self._changes(name))  # first: after a kill, a new collection would have them
            remove(dropped)
            os.replace(folder, dropped)  # readers see all of it or nothing
        remove(dropped)
        self._remove_if_dropped(name, [self._changes(name), temporary_path(folder)])
        self._opened.pop(name, None)

    def _remove_if_dropped(self, name: str, paths: Sequence[Path]) -> None:
        """Remove `paths` if there is no such collection, and no process writes it."""
        if self.root.is_dir():
            folder = self.root / name
            with suppress(DataError), WriterLock(lock_path(folder), folder):
                recover(folder)
                if not folder.exists():
                    for path in paths:
                        remove(path)

    # ----- aliases

    def aliases(self) -> dict[str, Alias]:
        """Return the links of the folder."""
        names, aliases = self.collections(), {}
        for link in sorted(self.root.glob("[!.]*")) if self.root.is_dir() else ():
            if link.is_symlink() and (name := os.readlink(link)) in names:
                previous_link = _previous(link)
                previous = os.readlink(previous_link) if previous_link.is_symlink() else None
                aliases[link.name] = Alias(name, previous if previous in names and previous != name else None)
        return aliases

    def switch(self, alias: str, name: str) -> None:
        """Replace the link of an alias. Raises ConfigError: the name of a collection; DataError: `check_complete`."""
        self._check_name(alias)
        link = self.root / alias
        self.check_switch(alias, name)
        if link.exists() and not link.is_symlink():
            raise ConfigError(f"alias {alias}: it is the name of a collection or another file; choose another one")
        current = self.aliases().get(alias)
        if current is None or current.name != name:
            # the previous one first: after a kill between both, the same switch has the same result
            links = [(link, name)] if current is None else [(_previous(link), current.name), (link, name)]
            for path, target in links:
                temporary = temporary_path(path)
                remove(temporary)
                temporary.symlink_to(target)
                os.replace(temporary, path)
            sync(self.root)

    # ----- documents

    def contents(self, collection: Collection) -> dict[str, int]:
        """Return the hashes of all documents, changes included."""
        return self._rows(self._folder(collection).name).contents()

    def write(self, collection: Collection, documents: Documents, version: int) -> None:
        """Add a file of written documents."""
        folder = self._folder(collection)
        if (model := _collection_of(folder).model) != collection.model:
            raise CheckpointError(
                f"collection {collection.name} of model {model[:12]} would have rows of model "
                f"{collection.model[:12]}; publish under another name"
            )
        num_docs, width = documents.vectors.shape
        values = pa.array(np.ascontiguousarray(documents.vectors, np.float32).reshape(-1))
        columns = {
            f"{COLUMN}{name}": pa.array(documents.columns[name], TYPES[type])
            for name, type in collection.columns.items()
        }
        table = pa.table({
            "doc_key": pa.array(documents.keys, pa.string()),
            "doc_title": pa.array(documents.titles, pa.string()),
            "doc_version": pa.array(np.full(num_docs, version)),
            "doc_content": pa.array(np.asarray(documents.contents, np.int64)),
            **columns,
            "vector": pa.FixedSizeListArray.from_arrays(values, width),
        })  # fmt: skip
        self._add(collection.name, table)

    def delete(self, collection: Collection, keys: Sequence[str], version: int) -> None:
        """Add a file of deletions."""
        self._folder(collection)
        ids = np.unique(np.array([hash64(key) for key in keys], np.int64))
        self._add(collection.name, pa.table({"id": ids, "version": np.full(len(ids), version)}))

    def count(self, collection: Collection, where: Expression | None = None) -> int:
        """Count documents of the index."""
        opened = self._open(collection)
        return opened.index.meta.num_docs if where is None else opened.allowed(where).count

    def search(
        self, collection: Collection, queries: np.ndarray, top: int, where: Expression | None = None,
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[ScoredDocument]]:  # fmt: skip
        """Search the index among the documents of a mask."""
        opened = self._open(collection)
        allowed = None if where is None else opened.allowed(where)
        return opened.index.search(queries, top, exclude, allowed)

    def vectors(self, collection: Collection, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Return the exact vectors of the existing documents among `keys`."""
        opened = self._open(collection)
        rows = opened.index.rows(list(keys))
        row_of = {key: row for key, row in zip(keys, rows.tolist(), strict=True) if row >= 0}
        titles = opened.index.title.take(pa.array(list(row_of.values()), pa.int64())).to_pylist()
        return {
            key: StoredVector(title, np.array(opened.vectors[row]))
            for (key, row), title in zip(row_of.items(), titles, strict=True)
        }

    # ----- files

    def _check_name(self, name: str) -> None:
        if not name.isprintable() or not 0 < len(name.encode()) <= NAME_BYTES or "/" in name or name[0] == ".":
            raise ConfigError(
                f"collection {name!r}: needs a name of 1 to {NAME_BYTES} printable bytes, without / and a first dot"
            )

    def _folder(self, collection: Collection) -> Path:
        folder = self.root / collection.name
        if not (folder / COLLECTION_FILE).is_file():
            raise DataError(f"collection {collection.name} was dropped; publish it again")
        return folder

    def _changes(self, name: str) -> Path:
        return self.root / f".{name}{CHANGES}"

    def _add(self, name: str, table: pa.Table) -> None:
        folder = self._changes(name)
        folder.mkdir(exist_ok=True)
        # in the order of the names, later changes come last: of writes with equal versions the last one wins
        with (
            new_file(folder / f"{time.time_ns():020}-{uuid.uuid4().hex}.arrow") as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)

    def _rows(self, name: str) -> "_Rows":
        return _Rows(self.root / name, sorted(self._changes(name).glob("[!.]*.arrow")))

    def _build(self, collection: Collection, documents: pa.Table, vectors: np.ndarray, tombstones: np.ndarray) -> None:
        """Replace the index folder of a collection."""
        meta = _meta(collection, len(vectors))
        backend = INDEX_TYPES.make(meta.kind, meta.options)
        with new_folder(self.root / collection.name) as temporary:
            np.save(temporary / VECTORS_FILE, vectors)
            np.save(temporary / TOMBSTONES_FILE, tombstones)
            with (
                pa.OSFile(str(temporary / DOCUMENTS_FILE), "wb") as file,
                pa.ipc.new_file(file, documents.schema) as writer,
            ):
                writer.write_table(documents)
            backend.write(
                backend.build(CodedVectors(vectors, "float32", meta.width, meta.has_beta)), temporary / INDEX_FILE
            )
            write_json(temporary / COLLECTION_FILE, asdict(collection))
            write_meta(temporary, meta)

    def _open(self, collection: Collection) -> "_Opened":
        """Return the opened index, which is opened again when its folder was replaced."""
        folder = self._folder(collection)
        for attempt in range(OPENING_ATTEMPTS):
            identity, opened = _identity(folder), self._opened.get(collection.name)
            if opened is None or opened.identity != identity:
                try:
                    opened = _Opened(folder, identity)
                except (CheckpointError, DataError, OSError):
                    if attempt + 1 == OPENING_ATTEMPTS or _identity(folder) == identity:
                        raise
                    continue  # the folder was replaced meanwhile
            if _identity(folder) == identity:
                break
        self._opened[collection.name] = opened
        collection.check_model(opened.index.meta.model_checksum)
        return opened


class _Opened:
    """An opened collection."""

    def __init__(self, folder: Path, identity: tuple[int, int]) -> None:
        """`identity` of the folder, see `_identity`. Raises: CheckpointError, DataError: it is damaged."""
        self.identity, self.index, self.collection = identity, open_index(folder), _collection_of(folder)
        self.vectors: np.ndarray = np.load(folder / VECTORS_FILE, mmap_mode="r")  # float32 [N, width]
        self.documents = open_arrow(folder / DOCUMENTS_FILE).read_all()
        self.allowed = lru_cache(CACHED_FILTERS)(self._allowed)

    def _allowed(self, where: Expression) -> AllowedDocuments:
        """Return the documents that match a resolved expression."""
        for condition in conditions(where):
            self.collection.column_type(condition.feature)  # is a column
        columns = self._columns
        features = {name: feature for name, (feature, _) in columns.items()}
        return AllowedDocuments(evaluate(where, features, lambda name: columns[name][1]))

    @cached_property
    def _columns(self) -> dict[str, tuple[Feature, Column]]:
        """Return the columns of filters, with features whose vocabularies are their values."""
        columns: dict[str, tuple[Feature, Column]] = {}
        for name, type in self.collection.columns.items():
            column = self.documents[f"{COLUMN}{name}"].combine_chunks()
            values = column.to_pylist()
            feature: Feature = Numeric()
            if type != "number":
                texts = column.flatten() if type == "categories" else column
                # UNKNOWN is no boolean: in a vocabulary of booleans alone, `true` and `1` would be one value
                vocabulary = Vocabulary.of(dict.fromkeys([UNKNOWN, *texts.unique().drop_null().to_pylist()]))
                feature = Categorical(multi=type == "categories", vocabulary=vocabulary)
                values = [value or feature.missing for value in values]
            feature = feature.with_name(name)
            columns[name] = feature, encode_values(feature, values, None)
        return columns


class _Rows:
    """Stored documents with the changes that `finish` will apply."""

    def __init__(self, folder: Path, changes: list[Path]) -> None:
        self.changes = changes
        self.tables: list[pa.Table] = []
        self.vectors: list[np.ndarray] = []
        self.row_of: dict[str, int] = {}  # by key, in the concatenated tables
        self.version_of: dict[str, int] = {}  # by key
        self.tombstones: dict[int, int] = {}  # version by hash of the key
        documents = open_arrow(folder / DOCUMENTS_FILE).read_all()
        self._write(documents, np.load(folder / VECTORS_FILE, mmap_mode="r"))
        stored = np.load(folder / TOMBSTONES_FILE)
        self.tombstones = dict(zip(stored["id"].tolist(), stored["version"].tolist(), strict=True))
        for path in changes:
            table = open_arrow(path).read_all()
            if "vector" in table.column_names:
                vector = table["vector"].combine_chunks()
                self._write(table.drop_columns("vector"), vector.flatten().to_numpy().reshape(len(vector), -1))
            else:
                versions = dict(zip(table["id"].to_pylist(), table["version"].to_pylist(), strict=True))
                for id, version in versions.items():
                    self.tombstones[id] = max(version, self.tombstones.get(id, version))
                for key in [key for key in self.row_of if versions.get(hash64(key), -1) >= self.version_of[key]]:
                    del self.row_of[key], self.version_of[key]

    def _write(self, table: pa.Table, vectors: np.ndarray) -> None:
        first = sum(map(len, self.vectors))
        self.tables.append(table)
        self.vectors.append(vectors)
        keys, versions = table["doc_key"].to_pylist(), table["doc_version"].to_pylist()
        for row, (key, version) in enumerate(zip(keys, versions, strict=True), first):
            is_deleted = bool(self.tombstones) and self.tombstones.get(hash64(key), -1) >= version
            if not is_deleted and self.version_of.get(key, version) <= version:
                self.row_of[key], self.version_of[key] = row, version

    def contents(self) -> dict[str, int]:
        """Return the hashes of documents by key."""
        contents = np.concatenate([table["doc_content"].to_numpy() for table in self.tables])
        return dict(zip(self.row_of, contents[list(self.row_of.values())].tolist(), strict=True))

    def merged(self) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        """Return the documents, their vectors, float32 [N, width], and the tombstones."""
        rows = np.array(list(self.row_of.values()), np.int64)
        vectors, first = np.empty((len(rows), self.vectors[0].shape[1]), np.float32), 0
        for part in self.vectors:
            inside = (rows >= first) & (rows < first + len(part))
            vectors[inside] = part[rows[inside] - first]
            first += len(part)
        tombstones = np.array(sorted(self.tombstones.items()), TOMBSTONE)
        return pa.concat_tables(self.tables).take(pa.array(rows)), vectors, tombstones


def _meta(collection: Collection, num_docs: int) -> VectorsMeta:
    """Return the meta of an index of a collection; an empty one is flat. Raises ConfigError: invalid options."""
    meta = VectorsMeta(
        VECTORS, collection.model, collection.dataset, num_docs, collection.width, score=collection.score,
        has_beta=collection.has_beta,
    )  # fmt: skip
    options = collection.options
    # of an empty collection, too, the options are validated
    built = index_meta(meta, INDEX_TYPES.make(options["type"], options["index"]), None, options["rescore"])
    return built if num_docs else index_meta(meta, INDEX_TYPES.make("flat"), None, 0)


def _collection_of(folder: Path) -> Collection:
    return Collection(**json.loads((folder / COLLECTION_FILE).read_text(encoding="utf-8")))


def _identity(folder: Path) -> tuple[int, int]:
    """Return numbers that change when the index folder is replaced."""
    status = (folder / META_FILE).stat()
    return status.st_ino, status.st_mtime_ns


def _previous(link: Path) -> Path:
    return link.with_name(f".{link.name}.previous")
