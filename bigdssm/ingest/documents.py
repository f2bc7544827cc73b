"""Distinct documents, numbered in order of first occurrence after the existing ones."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.dataset.catalogue import (
    DOCUMENT_COLUMN,
    SINCE_COLUMN,
    CatalogueFile,
    MappedTable,
    Versions,
    catalogue_files,
)
from bigdssm.dataset.remote import KEYS_SUFFIX
from bigdssm.dataset.schema import SortedKeys, write_keys
from bigdssm.features import Feature
from bigdssm.ingest.dataset_writer import AS_OF, DatasetWriter
from bigdssm.ingest.engines import LocalEngine, RowTable
from bigdssm.utils.hashing import hash_strings

IS_NEW = "is_new"  # 1 if a row is of a new document, or has other features than the stored version
KNOWN_SINCE = "known_since"  # rows with times: start of the stored version that they were compared with; −∞: none
DOCUMENT_COLUMNS = {
    "place": pa.int64(),
    "doc_id": pa.int64(),
    "content": pa.int64(),
    "doc_key": pa.large_string(),
    "doc_title": pa.large_string(),
}


@dataclass(frozen=True)
class StoredDocuments:
    """A lookup of a dataset's documents by key; pickled as its files, which workers map."""

    keys: SortedKeys  # of all documents
    files: tuple[CatalogueFile, ...]  # newer versions last
    has_times: bool  # versions have times

    @classmethod
    def of(cls, writer: DatasetWriter) -> "StoredDocuments":
        """Return the documents of the dataset to append to."""
        files, has_times = catalogue_files(writer.out, writer.content), writer.content.get("items") == AS_OF["items"]
        return cls(SortedKeys(writer.key_files), tuple(files), has_times)

    @cached_property
    def _table(self) -> MappedTable:
        return MappedTable([file.path for file in self.files])

    @cached_property
    def _versions(self) -> Versions | None:
        return Versions.read(self.files, dated=self.has_times)

    def compare(self, rows: pa.Table) -> pa.Table:
        """Match incoming rows against stored document versions.

        Add the columns `document` (-1: new) and IS_NEW. Features of unchanged rows become null; their ordinals still
        determine first occurrences. Rows with times are compared with the version as of that time, keep their features,
        and get KNOWN_SINCE.
        """
        documents = self.keys.find(rows.column("doc_id").to_numpy())
        is_new, known_since = np.ones(rows.num_rows, bool), np.full(rows.num_rows, -np.inf)
        matched = np.flatnonzero(documents >= 0)
        if len(matched):
            stored = documents[matched]
            if self.has_times:
                since = rows.column(SINCE_COLUMN).to_numpy()[matched]
                stored = stored if self._versions is None else self._versions.file_rows_at(stored, since)
                began = np.asarray(self._table.take(SINCE_COLUMN, stored))
                known_since[matched] = np.where(began <= since, began, -np.inf)
            elif self._versions is not None:
                stored = self._versions.file_rows(stored)
            is_new[matched] = rows.column("content").to_numpy()[matched] != self._table.take("content", stored)
            title = rows.column("doc_title").combine_chunks().take(pa.array(matched)).cast(pa.large_string())
            is_new[matched] |= pc.not_equal(title, self._table.arrow("doc_title", stored)).to_numpy(
                zero_copy_only=False
            )
            is_new[matched] |= np.isinf(known_since[matched]) & self.has_times  # older than all stored versions
        columns = {name: rows.column(name) for name in rows.column_names}
        if self.has_times:
            columns[KNOWN_SINCE] = pa.array(known_since)
        elif not is_new.all():
            for name in columns.keys() - {"place", "doc_id", "content", "doc_key"}:
                columns[name] = pc.if_else(pa.array(is_new), columns[name], pa.scalar(None, columns[name].type))
        return pa.table({**columns, "document": pa.array(documents), IS_NEW: pa.array(is_new.astype(np.int32))})


def document_schema(features: Mapping[str, Feature], *, has_times: bool = False) -> pa.Schema:
    """Return the schema of rows of `StoredDocuments.compare`, optionally with times.

    Canonical features are in columns d0, d1, …
    """
    compared = [("document", pa.int64()), (IS_NEW, pa.int32())]
    times = [(SINCE_COLUMN, pa.float64()), (KNOWN_SINCE, pa.float64())] if has_times else []
    return pa.schema([*DOCUMENT_COLUMNS.items(), *spool_columns("d", features), *times, *compared])


def spool_columns(prefix: str, features: Mapping[str, Feature]) -> list[tuple[str, pa.DataType]]:
    """Return the intermediate columns of canonical features."""
    return [(f"{prefix}{number}", _spool_type(feature)) for number, feature in enumerate(features.values())]


def canonical_columns(table: pa.Table, prefix: str, features: Mapping[str, Feature]) -> pa.Table:
    """Restore canonical columns from spooled ones.

    Nulls (of unmatched join rows) become missing values.
    """
    columns = {}
    for number, (name, feature) in enumerate(features.items()):
        spooled = _spool_type(feature)
        column = table.column(f"{prefix}{number}").combine_chunks().cast(spooled)
        columns[name] = pc.fill_null(column, pa.scalar(feature.missing, spooled)).cast(feature.canonical_type)
    return pa.table(columns)


def _spool_type(feature: Feature) -> pa.DataType:
    """Return the intermediate type of values: engines do not support fixed-size lists."""
    dtype = feature.canonical_type
    return pa.list_(dtype.value_type) if pa.types.is_fixed_size_list(dtype) else dtype


def document_rows(
    ordinals: np.ndarray, content: np.ndarray, keys: pa.Array, titles: pa.Array, table: pa.Table
) -> pa.Table:
    """Return rows of `document_schema` before `compare`; the key replaces an empty title."""
    titles = pc.if_else(pc.equal(titles, ""), keys, titles)
    columns = [pa.array(ordinals), pa.array(hash_strings(keys)), pa.array(content), keys, titles, *table.columns]
    names = [*DOCUMENT_COLUMNS, *(f"d{number}" for number in range(table.num_columns))]
    return pa.Table.from_arrays(columns, names=names)


@dataclass(frozen=True)
class DistinctDocuments:
    """New and changed documents, in order, and the catalogue rows of all documents."""

    table: RowTable
    first: int  # catalogue row of the first new document
    keys: SortedKeys  # of all documents, by doc_id
    changed: RowTable | None = None  # new versions of documents; `document` is the catalogue row
    versions: RowTable | None = None  # of rows with times (`since`): new documents and new versions

    @property
    def total(self) -> int:
        """The number of all documents, existing and new."""
        return self.first + self.table.num_rows

    @property
    def num_changed(self) -> int:
        """The number of existing documents with new versions."""
        if self.changed is None:
            return 0
        document = self.changed.read(columns=[DOCUMENT_COLUMN]).column(DOCUMENT_COLUMN).to_numpy()
        return len(np.unique(document[document < self.first]))


def number_documents(engine: LocalEngine, writer: DatasetWriter) -> DistinctDocuments:
    """Number the new documents of `document_rows`, and write their key file.

    Of several rows of a document, the first one's features are used (`unique_documents`).
    """
    engine.view("first_documents", first_rows("document_rows", "doc_id"))
    engine.view("unique_documents", f"SELECT * FROM first_documents WHERE nth = 1 AND {IS_NEW} = 1")
    table = engine.select("documents", "SELECT * FROM unique_documents WHERE document < 0", order="place, doc_id")
    changed = None
    if writer.append:
        changed = engine.select(
            "changed_documents", "SELECT * FROM unique_documents WHERE document >= 0", order="document"
        )
    return DistinctDocuments(table, writer.num_existing_docs, _keys(engine, writer, table), changed)


def number_versions(engine: LocalEngine, writer: DatasetWriter, rows: RowTable) -> DistinctDocuments:
    """Number documents whose rows have times: later rows are newer versions.

    Of rows with equal times, the last one is used. Rows equal to the previous version, new or stored, are dropped.
    """
    engine.view(
        "rows_by_time",
        "SELECT *, min(place) OVER (PARTITION BY doc_id) AS first_place, row_number() OVER "
        f"(PARTITION BY doc_id, {SINCE_COLUMN} ORDER BY place DESC) AS newest FROM document_rows",
    )
    by_time = f"OVER (PARTITION BY doc_id ORDER BY {SINCE_COLUMN})"
    before = ", ".join(f"lag({name}) {by_time} AS {name}_before" for name in (SINCE_COLUMN, "content", "doc_title"))
    engine.view(
        "consecutive_documents",
        f"SELECT *, row_number() {by_time} AS nth, {before} FROM rows_by_time WHERE newest = 1",
    )
    columns = [name for name in rows.read(0, 0).column_names if name not in ("document", IS_NEW, KNOWN_SINCE)]
    versions = engine.select(
        "unique_documents",
        f"SELECT {', '.join(columns)}, document, nth, first_place FROM consecutive_documents "
        f"WHERE CASE WHEN {SINCE_COLUMN}_before >= {KNOWN_SINCE} "
        f"THEN content <> content_before OR doc_title <> doc_title_before ELSE {IS_NEW} = 1 END",
        order="place, doc_id",
    )
    columns = [f"t.{name}" for name in columns]
    table = engine.select(
        "documents",
        f"SELECT {', '.join(columns)} FROM unique_documents t WHERE t.document < 0 AND t.nth = 1",
        order="first_place, doc_id",
    )
    changed = engine.select(
        "changed_documents",
        f"SELECT {', '.join(columns)}, coalesce(d.number + {writer.num_existing_docs}, t.document) AS document "
        "FROM unique_documents t LEFT JOIN documents d ON t.doc_id = d.doc_id WHERE t.document >= 0 OR t.nth > 1",
        order=f"document, {SINCE_COLUMN}",
    )
    return DistinctDocuments(table, writer.num_existing_docs, _keys(engine, writer, table), changed, versions)


def _keys(engine: LocalEngine, writer: DatasetWriter, table: RowTable) -> SortedKeys:
    """Return the keys of existing and new documents, writing the key file of the new ones."""
    if not table.num_rows:
        return SortedKeys(writer.key_files)
    file = writer.catalogue_dir / f"{len(writer.content['catalogue']):06d}{KEYS_SUFFIX}"
    write_document_keys(engine, "documents", "doc_id", writer.num_existing_docs, file)
    return SortedKeys([*writer.key_files, file])


def first_rows(table: str, key: str) -> str:
    """Return a query that numbers a table's rows per key from 1, in order of ordinals (`nth`)."""
    return f"SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY place) AS nth FROM {table}"


def write_document_keys(engine: LocalEngine, table: str, column: str, first: int, file: Path) -> None:
    """Write the key file of an ordered table, unless it exists.

    The table's row 0 becomes row `first`. Written elsewhere and renamed, because workers may have it mapped.
    """
    if not file.exists():
        by_id = engine.select(f"{table}_by_id", f"SELECT {column}, number FROM {table}", order=column)
        pieces = (
            (piece.column(column).to_numpy(), piece.column("number").to_numpy() + first) for piece in by_id.batches()
        )
        write_keys(engine.spool / file.name, by_id.num_rows, pieces)
        os.replace(engine.spool / file.name, file)
