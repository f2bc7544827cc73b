"""Distinct documents of an ingestion, numbered in order of first occurrence behind the existing ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.dataset.keys import SortedKeys, write_keys
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.versions import DOCUMENT_COLUMN, SINCE_COLUMN, CatalogueFile, Versions, catalogue_files
from bigdssm.features import Feature
from bigdssm.ingest.dataset_writer import AS_OF, DatasetWriter
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import RowTable
from bigdssm.utils.string_hashing import hash_strings

IS_NEW = "is_new"  # whether a row has features that the dataset has not: of a new document, or other ones than it had
KNOWN_SINCE = "known_since"  # from when on the version holds that a row with a time was compared with; −∞: it has none


@dataclass(frozen=True)
class StoredDocuments:
    """Finds a dataset's documents by key; picklable as its files, which workers map."""

    keys: SortedKeys  # of all documents
    files: tuple[CatalogueFile, ...]  # those of versions last
    dated: bool  # whether they have times

    @classmethod
    def of(cls, writer: DatasetWriter) -> StoredDocuments:
        """Return those of the dataset that is written."""
        files = tuple(catalogue_files(writer.out, writer.content))
        return cls(SortedKeys(writer.key_files), files, writer.content.get("items") == AS_OF["items"])

    @cached_property
    def _table(self) -> MappedTable:
        return MappedTable([file.path for file in self.files])

    @cached_property
    def _versions(self) -> Versions | None:
        return Versions.read(self.files, dated=self.dated)

    def compared(self, rows: pa.Table) -> pa.Table:
        """Return rows of documents with the columns `document`, which they are (-1: new), and IS_NEW.

        What the dataset has already is null in the others: such a row only tells where its document stands first.
        Rows with times are compared with what their documents were then, stay whole, and get KNOWN_SINCE.
        """
        documents = self.keys.find(rows.column("doc_id").to_numpy())
        is_new, known_since = np.ones(rows.num_rows, bool), np.full(rows.num_rows, -np.inf)
        known = np.flatnonzero(documents >= 0)
        if len(known):
            at = documents[known]
            if self.dated:
                since = rows.column(SINCE_COLUMN).to_numpy()[known]
                at = at if self._versions is None else self._versions.file_rows_at(at, since)
                began = np.asarray(self._table.take(SINCE_COLUMN, at))
                known_since[known] = np.where(began <= since, began, -np.inf)
            elif self._versions is not None:
                at = self._versions.file_rows(at)
            is_new[known] = rows.column("content").to_numpy()[known] != self._table.take("content", at)
            title = rows.column("doc_title").combine_chunks().take(pa.array(known)).cast(pa.large_string())
            is_new[known] |= pc.not_equal(title, self._table.arrow("doc_title", at)).to_numpy(zero_copy_only=False)
            is_new[known] |= np.isinf(known_since[known]) & self.dated  # older than all that is known
        columns = {name: rows.column(name) for name in rows.column_names}
        if self.dated:
            columns[KNOWN_SINCE] = pa.array(known_since)
        elif not is_new.all():
            for name in columns.keys() - {"place", "doc_id", "content", "doc_key"}:
                columns[name] = pc.if_else(pa.array(is_new), columns[name], pa.scalar(None, columns[name].type))
        return pa.table({**columns, "document": pa.array(documents), IS_NEW: pa.array(is_new.astype(np.int32))})


DOCUMENT_COLUMNS = {
    "place": pa.int64(),
    "doc_id": pa.int64(),
    "content": pa.int64(),
    "doc_key": pa.large_string(),
    "doc_title": pa.large_string(),
}


def document_schema(features: Mapping[str, Feature], *, dated: bool = False) -> pa.Schema:
    """Return the schema of documents between two steps, as `KnownDocuments.compared` leaves them, maybe with times.

    They have their keys, and canonical features as columns d0, d1, …
    """
    compared = [("document", pa.int64()), (IS_NEW, pa.int32())]
    times = [(SINCE_COLUMN, pa.float64()), (KNOWN_SINCE, pa.float64())] if dated else []
    return pa.schema([*DOCUMENT_COLUMNS.items(), *spool_columns("d", features), *times, *compared])


def spool_columns(prefix: str, features: Mapping[str, Feature]) -> list[tuple[str, pa.DataType]]:
    """Return the columns in which canonical features wait between two steps."""
    return [(f"{prefix}{number}", _spool_type(feature)) for number, feature in enumerate(features.values())]


def canonical_of(table: pa.Table, prefix: str, features: Mapping[str, Feature]) -> pa.Table:
    """Return spooled columns as canonical ones, null (of a row that was joined with nothing) as missing."""
    columns = {}
    for number, (name, feature) in enumerate(features.items()):
        waited = _spool_type(feature)
        column = table.column(f"{prefix}{number}").combine_chunks().cast(waited)
        columns[name] = pc.fill_null(column, pa.scalar(feature.missing, waited)).cast(feature.canonical_type)
    return pa.table(columns)


def _spool_type(feature: Feature) -> pa.DataType:
    """Return the type in which canonical values wait: engines know no lists of a fixed size."""
    dtype = feature.canonical_type
    return pa.list_(dtype.value_type) if pa.types.is_fixed_size_list(dtype) else dtype


def document_rows(place: np.ndarray, content: np.ndarray, keys: pa.Array, title: pa.Array, table: pa.Table) -> pa.Table:
    """Return rows of `document_schema`, not yet compared; a document without a title is shown by its key."""
    shown = pc.if_else(pc.equal(title, ""), keys, title)
    columns = [pa.array(place), pa.array(hash_strings(keys)), pa.array(content), keys, shown, *table.columns]
    names = [*DOCUMENT_COLUMNS, *(f"d{number}" for number in range(table.num_columns))]
    return pa.Table.from_arrays(columns, names=names)


@dataclass(frozen=True)
class DistinctDocuments:
    """The new and changed documents of a making, in order, and where all documents stand in the catalogue."""

    table: RowTable
    first: int  # the catalogue row of the first new one
    keys: SortedKeys  # of all documents, by doc_id
    changed: RowTable | None = None  # further versions of documents; `document` is each one's catalogue row
    versions: RowTable | None = None  # of rows with times, `since`: both

    @property
    def dated(self) -> bool:
        """Return whether they have times."""
        return self.versions is not None

    @property
    def total(self) -> int:
        """Return how many there are with those that were known."""
        return self.first + self.table.num_rows

    @property
    def num_changed(self) -> int:
        """Return how many of those that were known have further versions."""
        if self.changed is None:
            return 0
        document = self.changed.read(columns=[DOCUMENT_COLUMN]).column(DOCUMENT_COLUMN).to_numpy()
        return len(np.unique(document[document < self.first]))


def number_documents(engine: LocalEngine, writer: DatasetWriter) -> DistinctDocuments:
    """Return the engine's `found_documents`, numbered behind those that the dataset has; they get a key file.

    Of several rows of one document the first tells its features: those that do are `told_documents`.
    """
    engine.view("first_documents", first_rows("found_documents", "doc_id"))
    engine.view("told_documents", f"SELECT * FROM first_documents WHERE nth = 1 AND {IS_NEW} = 1")
    table = engine.select("documents", "SELECT * FROM told_documents WHERE document < 0", order="place, doc_id")
    changed = None
    if writer.append:
        known = "SELECT * FROM told_documents WHERE document >= 0"
        changed = engine.select("changed_documents", known, order="document")
    return DistinctDocuments(table, writer.num_known_docs, _keys(engine, writer, table), changed)


def number_versions(engine: LocalEngine, writer: DatasetWriter, found: RowTable) -> DistinctDocuments:
    """As `number_documents`, of rows with times: a document's oldest is its first version, others are further ones.

    Of rows of one time the last counts. A row that is as the version before it, maybe the dataset's, tells nothing.
    """
    engine.view(
        "newest_of_time",
        "SELECT *, min(place) OVER (PARTITION BY doc_id) AS first_place, row_number() OVER "
        f"(PARTITION BY doc_id, {SINCE_COLUMN} ORDER BY place DESC) AS newest FROM found_documents",
    )
    by_time = f"OVER (PARTITION BY doc_id ORDER BY {SINCE_COLUMN})"
    before = ", ".join(f"lag({name}) {by_time} AS {name}_before" for name in (SINCE_COLUMN, "content", "doc_title"))
    engine.view(
        "dated_documents",
        f"SELECT *, row_number() {by_time} AS nth, {before} FROM newest_of_time WHERE newest = 1",
    )
    own = [name for name in found.read(0, 0).column_names if name not in ("document", IS_NEW, KNOWN_SINCE)]
    versions = engine.select(
        "told_documents",
        f"SELECT {', '.join(own)}, document, nth, first_place FROM dated_documents "
        f"WHERE CASE WHEN {SINCE_COLUMN}_before >= {KNOWN_SINCE} "
        f"THEN content <> content_before OR doc_title <> doc_title_before ELSE {IS_NEW} = 1 END",
        order="place, doc_id",
    )
    own = [f"t.{name}" for name in own]
    table = engine.select(
        "documents",
        f"SELECT {', '.join(own)} FROM told_documents t WHERE t.document < 0 AND t.nth = 1",
        order="first_place, doc_id",
    )
    changed = engine.select(
        "changed_documents",
        f"SELECT {', '.join(own)}, coalesce(d.number + {writer.num_known_docs}, t.document) AS document "
        "FROM told_documents t LEFT JOIN documents d ON t.doc_id = d.doc_id WHERE t.document >= 0 OR t.nth > 1",
        order=f"document, {SINCE_COLUMN}",
    )
    return DistinctDocuments(table, writer.num_known_docs, _keys(engine, writer, table), changed, versions)


def _keys(engine: LocalEngine, writer: DatasetWriter, table: RowTable) -> SortedKeys:
    """Return the keys of the dataset's documents and of the new ones, which get a file."""
    if not table.num_rows:
        return SortedKeys(writer.key_files)
    write_document_keys(engine, "documents", "doc_id", writer.num_known_docs, writer.new_key_file)
    return SortedKeys([*writer.key_files, writer.new_key_file])


def first_rows(table: str, key: str) -> str:
    """Return a query for a table's rows with `nth`: from 1 on among those of one key, by place."""
    return f"SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY place) AS nth FROM {table}"


def write_document_keys(engine: LocalEngine, table: str, column: str, first: int, file: Path) -> None:
    """Make `file` the key file of an ordered table by a column; its `number` 0 is row `first`. It may be there already.

    Never written where it stands: workers may have it mapped.
    """
    if not file.exists():
        by_id = engine.select(f"{table}_by_id", f"SELECT {column}, number FROM {table}", order=column)
        pieces = (
            (piece.column(column).to_numpy(), piece.column("number").to_numpy() + first) for piece in by_id.batches()
        )
        write_keys(engine.spool / file.name, by_id.num_rows, pieces)
        os.replace(engine.spool / file.name, file)
