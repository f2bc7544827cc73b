"""The catalogue (corpus): the features of all documents, memory-mapped and addressed by row.

A row d < num_docs is document d, in its newest version. A document keeps its number, the only reference in blocks,
sequences and counts. The catalogue's first files have the first version of every document, in the order of their
numbers; later files have newer versions. If documents have changed, rows from num_docs on are all of their versions, in
the order of the files.

All documents of a step are in their newest versions, as served: a positive in the version of its event could be
recognized by any feature that depends on time. The items of a history have the versions that were current when their
partition was added or, if versions have times, at the time of their event (stored in the sequences).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.dataset.schema import Schema
from bigdssm.errors import DataError
from bigdssm.features import Feature, ragged
from bigdssm.features.base import filterable
from bigdssm.features.ragged import Column, Ragged, from_arrow
from bigdssm.utils.array_file import open_arrow
from bigdssm.utils.hashing import hash64

DOCUMENT_COLUMN = "document"  # in files of newer versions and of withdrawals: the document number
WITHDRAWN_COLUMN = "withdrawn"  # in files of withdrawals: 1, or 0 for a document that is back
NO_ROWS = np.zeros(0, np.int64)
SINCE_COLUMN = "since"  # in all files of a catalogue with times: start of validity


class MappedTable:
    """Memory-mapped Arrow files (of a catalogue, or of sequences) as one table with rows 0 … num_rows - 1.

    Opening reads only the footers, and all processes on a machine share the pages. Each file must contain the columns
    of the first one; later files may have more.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._batches: list[pa.RecordBatch] = []
        self.rows_per_file: list[int] = []
        for path in self.paths:
            reader = open_arrow(path)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            others = self._batches[0].schema.names if self._batches else []
            if not set(others) <= set(reader.schema.names):
                missing = sorted(set(others) - set(reader.schema.names))
                raise DataError(f"{path} lacks the columns {missing} of {self.paths[0]}; rebuild the dataset")
            self._batches += [batch for batch in batches if batch.num_rows]
            self.rows_per_file.append(sum(batch.num_rows for batch in batches))
            self.schema = reader.schema
        self._starts = ragged.offsets_of(np.array([batch.num_rows for batch in self._batches], np.int64))
        self._columns: dict[str, list[Column]] = {}

    @property
    def num_rows(self) -> int:
        """The number of rows in all files."""
        return int(self._starts[-1])

    def _parts(self, name: str) -> list[Column]:
        if name not in self._columns:
            arrays = [batch.column(batch.schema.get_field_index(name)) for batch in self._batches]
            if any(array.null_count for array in arrays):
                raise DataError(f"{self.paths[0].parent}: column {name} has nulls; rebuild the dataset")
            self._columns[name] = [from_arrow(array) for array in arrays]
        return self._columns[name]

    def column(self, name: str) -> np.ndarray:
        """Return a whole fixed-width column; copied only if the table has several record batches."""
        parts = self._parts(name)
        return np.asarray(ragged.concat(parts) if parts else from_arrow(pa.array([], self.schema.field(name).type)))

    def take(self, name: str, rows: np.ndarray) -> Column:
        """Return the column's values at `rows` (int64, in range), in that order."""
        return self._gather(name, rows, lambda part, local: ragged.take(part, local))

    def take_slices(self, name: str, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
        """Return, for every i, the slice [starts[i], ends[i]) of the list at rows[i]."""

        def cut(part: Ragged, local: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Ragged:
            first = part.offsets[local]
            return ragged.gather_ranges(part.values, first + begin, first + end)

        return self._gather(name, rows, cut, starts, ends)

    def lengths(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the lengths of the lists at `rows`, int64."""
        return self._gather(name, rows, lambda part, local: part.offsets[local + 1] - part.offsets[local])

    def strings(self, name: str, rows: np.ndarray) -> list[str]:
        """Return a string column's values at `rows`."""
        return list(self.arrow(name, rows).to_pylist())

    def arrow(self, name: str, rows: np.ndarray) -> pa.Array:
        """Return the column's values at `rows` (int64, in range), in that order, as an Arrow array."""
        if not len(rows):
            return pa.array([], self.schema.field(name).type)
        groups, local, back = self._by_batch(rows)
        pieces = [self._batches[b].column(name).take(pa.array(local[group])) for b, group in groups]
        return pa.concat_arrays(pieces).take(pa.array(back))

    def _by_batch(self, rows: np.ndarray) -> tuple[list[tuple[int, np.ndarray]], np.ndarray, np.ndarray]:
        """Return (batch, indices into `rows`) groups, the rows within batches, the inverse order."""
        batch_of = np.searchsorted(self._starts, rows, "right") - 1
        order = np.argsort(batch_of, kind="stable")
        present, begins = np.unique(batch_of[order], return_index=True)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        groups = list(zip(present.tolist(), np.split(order, begins[1:]), strict=True))
        return groups, rows - self._starts[batch_of], back

    def _gather(self, name: str, rows: np.ndarray, cut, *more: np.ndarray):  # type: ignore[no-untyped-def]
        parts = self._parts(name)
        if len(parts) == 1:
            return cut(parts[0], rows, *more)
        if not len(rows):
            empty = from_arrow(pa.array([], self.schema.field(name).type))
            return cut(parts[0] if parts else empty, rows, *more)
        groups, local, back = self._by_batch(rows)
        pieces = [cut(parts[b], local[group], *(m[group] for m in more)) for b, group in groups]
        return ragged.take(ragged.concat(pieces), back)


@dataclass(frozen=True)
class CatalogueFile:
    """One file of a catalogue."""

    path: Path
    rows: int
    checksum: str
    since: int | None = None  # newer versions and withdrawals: the first partition that sees them
    first_doc: int = 0  # newer versions and withdrawals: offset of their dataset's documents


def path_inside(folder: Path, path: str) -> Path:
    """Join a path from metadata to the folder. Raises DataError: it leads out of the folder."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DataError(f"{folder}: its metadata names a file {path!r}, not a plain path inside it; rejected")
    return folder / path


def catalogue_files(
    folder: Path, content: Mapping[str, Any], kinds: Sequence[str] = ("catalogue", "versions")
) -> list[CatalogueFile]:
    """List files of the catalogue, by default all but withdrawals, newer versions last; `content` is dataset.json.

    Raises DataError: it is damaged.
    """
    numbers = {None: None, **{name: number for number, name in enumerate(content["partitions"])}}
    files = []
    for part in [part for kind in kinds for part in content.get(kind, [])]:
        if (since := part.get("since")) not in numbers:
            raise DataError(f"{folder}/dataset.json is damaged: {part['file']} belongs to no partition; copy it again")
        files.append(CatalogueFile(path_inside(folder, part["file"]), part["rows"], part["checksum"], numbers[since]))
    return files


def withdrawn_documents(files: Sequence[CatalogueFile], num_docs: int) -> np.ndarray:
    """Return the documents that the last of `files` with them withdraws, int64, ascending.

    Raises DataError: unknown documents.
    """
    withdrawn = np.zeros(0, np.int64)
    for file in files:
        table = MappedTable([file.path])
        documents, states = table.column(DOCUMENT_COLUMN) + file.first_doc, table.column(WITHDRAWN_COLUMN) > 0
        if len(documents) and (documents.min() < 0 or documents.max() >= num_docs):
            raise DataError(f"{file.path} has withdrawals of documents outside the catalogue; copy it again")
        withdrawn = np.union1d(np.setdiff1d(withdrawn, documents), documents[states])
    return withdrawn


def distinct_documents(document: np.ndarray) -> np.ndarray:
    """Return the distinct documents, ascending.

    Faster than np.unique, because a stable sort merges sorted runs.
    """
    ordered = np.sort(document, kind="stable")
    return ordered[np.flatnonzero(np.diff(ordered, prepend=-1))]


class Versions:
    """A lookup from documents to rows and file rows of their versions.

    A *row* is a document number (the newest version), or a number ≥ num_docs (an earlier version), valid while the
    dataset is open. A *file row* is a position in the concatenated catalogue files.
    """

    def __init__(self, num_docs: int, times: np.ndarray, begin: np.ndarray, file_row: np.ndarray) -> None:
        """Index all versions of the documents with several versions.

        `times` float64 [t], ascending: the distinct start times. `begin` int64 [n], ascending: document · (t + 1) + the
        number of `times` up to the version's start, 0 for a document's oldest version. `file_row` int64 [n].
        """
        self.num_docs, self.times, self.begin, self.file_row = num_docs, times, begin, file_row
        self._steps = len(times) + 1
        self._document = begin // self._steps

    @classmethod
    def of(cls, num_docs: int, document: np.ndarray, since: np.ndarray, first: np.ndarray | None = None) -> "Versions":
        """Build the index from newer versions, in file order, and the documents' first versions.

        `document` int64, `since` float64 [versions]: the document and start (time or partition) of each newer version.
        `first` float64 [distinct documents]: the starts of the first versions, by document number; None: −∞. If starts
        are equal, the later version in the files is newer.
        """
        changed = distinct_documents(document)
        first = np.full(len(changed), -np.inf) if first is None else first
        times, nth = np.unique(np.concatenate([first, since]), return_inverse=True)
        documents = np.concatenate([changed, document])
        file_row = np.concatenate([changed, num_docs + np.arange(len(document))])
        begin = documents * (len(times) + 1) + nth + 1
        order = np.argsort(begin, kind="stable")  # fast: merges sorted runs
        begin, documents = begin[order], documents[order]
        oldest = np.flatnonzero(np.diff(documents, prepend=-1))
        begin[oldest] = documents[oldest] * (len(times) + 1)
        return cls(num_docs, times, begin, file_row[order])

    @classmethod
    def read(cls, files: Sequence[CatalogueFile], *, dated: bool) -> "Versions | None":
        """Read the versions in a catalogue's files, with times (`dated`) or without.

        None if there are none. Raises DataError: versions of unknown documents.
        """
        firsts = [file for file in files if file.since is None]
        newer = [file for file in files if file.since is not None]
        if not newer:
            return None
        num_docs = sum(file.rows for file in firsts)
        documents = []
        for file in newer:
            documents.append(MappedTable([file.path]).column(DOCUMENT_COLUMN) + file.first_doc)
            if len(documents[-1]) and (documents[-1].min() < 0 or documents[-1].max() >= num_docs):
                raise DataError(f"{file.path} has versions of documents outside the catalogue; copy it again")
        document = np.concatenate(documents)
        if not dated:  # then the column may be a feature of that name
            since = np.repeat([float(file.since or 0) for file in newer], [len(part) for part in documents])
            return cls.of(num_docs, document, since)
        first = MappedTable([file.path for file in firsts]).take(SINCE_COLUMN, distinct_documents(document))
        since = MappedTable([file.path for file in newer]).column(SINCE_COLUMN)
        return cls.of(num_docs, document, since, np.asarray(first))

    def file_rows(self, rows: np.ndarray) -> np.ndarray:
        """Convert rows to file rows, int64."""
        return np.where(rows < self.num_docs, self._newest(rows), rows - self.num_docs)

    def file_rows_at(self, documents: np.ndarray, when: np.ndarray) -> np.ndarray:
        """Return the file rows of documents as of times or partition numbers (`when`), int64.

        Before a document's first version, its oldest version is used.
        """
        key = documents * self._steps + np.searchsorted(self.times, when, "right")
        return self._version_before(np.searchsorted(self.begin, key, "right"), documents)

    def visible_rows(
        self, documents: np.ndarray, partitions: np.ndarray, versions: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the rows of documents in the versions visible to partitions (by number), or in `versions`, int64.

        `versions` are numbers among the newer versions in file order; −1, or a version of another document, selects the
        first version.
        """
        if versions is None:
            file_row = self.file_rows_at(documents, partitions)
        else:
            valid = (versions >= 0) & (versions < len(self.document_of))
            valid &= self.document_of[np.where(valid, versions, 0)] == documents
            file_row = np.where(valid, self.num_docs + versions.astype(np.int64), documents)
        return np.where(file_row == self._newest(documents), documents, self.num_docs + file_row)

    @cached_property
    def document_of(self) -> np.ndarray:
        """The documents of the newer versions, int64, in file order."""
        newer = self.file_row >= self.num_docs
        documents = np.empty(int(newer.sum()), np.int64)
        documents[self.file_row[newer] - self.num_docs] = self._document[newer]
        return documents

    def _newest(self, rows: np.ndarray) -> np.ndarray:
        return self._version_before(np.searchsorted(self._document, rows, "right"), rows)

    def _version_before(self, behind: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return file rows of the versions before indices `behind`, or of the first versions."""
        index = np.maximum(behind - 1, 0)
        return np.where(self._document[index] == documents, self.file_row[index], documents)


class Catalogue:
    """The documents 0 … num_docs - 1 and their earlier versions."""

    def __init__(
        self, paths: Sequence[Path], schema: Schema, versions: Versions | None = None, withdrawn: np.ndarray = NO_ROWS
    ) -> None:
        """Memory-map the catalogue's files `paths`, ordered by partition.

        `withdrawn`: the rows of documents that are neither answers nor drawn as negatives, int64, ascending.
        Raises DataError: a file is missing or unreadable, or lacks a column of the schema.
        """
        self._table, self.versions, self.withdrawn = MappedTable(paths), versions, withdrawn
        self._schema = schema
        self._encoded_by: dict[str, Feature] | None = None  # document features of an earlier schema, see `with_schema`
        names = self._table.schema.names
        for name in ("doc_key", "doc_id", "doc_title", *schema.documents):
            if name not in names:
                raise DataError(f"{self._table.paths[0].parent}: the catalogue has no column {name}, only {names}")

    def with_schema(self, schema: Schema) -> "Catalogue":
        """Return a view encoded by an earlier schema; unknown values are out of vocabulary."""
        limited = copy(self)
        limited._encoded_by = schema.doc
        return limited

    @property
    def filterable(self) -> dict[str, Feature]:
        """The features of documents that filters can read, in their whole vocabularies."""
        return filterable(self._schema.documents)

    @property
    def num_docs(self) -> int:
        """The number of documents."""
        return self._table.num_rows if self.versions is None else self.versions.num_docs

    @property
    def num_candidates(self) -> int:
        """The number of documents that are not withdrawn."""
        return self.num_docs - len(self.withdrawn)

    @property
    def all_rows(self) -> np.ndarray:
        """The rows of all documents, and of all versions if documents have changed, int64."""
        return np.arange(self.num_docs if self.versions is None else self.num_docs + self._table.num_rows)

    @property
    def rows_per_file(self) -> list[int]:
        """The number of rows per file."""
        return self._table.rows_per_file

    @cached_property
    def doc_ids(self) -> np.ndarray:
        """The ids of all documents, int64 [num_docs]."""
        return self._table.column("doc_id")[: self.num_docs]

    def first_times(self) -> np.ndarray:
        """Return the start of each document's oldest version, float64 [num_docs], of a catalogue with times."""
        since = self._table.column(SINCE_COLUMN)
        first = since[: self.num_docs].copy()
        if self.versions is not None:
            np.minimum.at(first, self.versions.document_of, since[self.num_docs :])
        return first

    def visible_rows(
        self, documents: np.ndarray, partitions: np.ndarray, versions: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Return the catalogue rows of the document versions in histories of `partitions`, int64.

        `partitions` are partition numbers; `versions`, if given, takes precedence (`Versions.visible_rows`). None if no
        document has changed.
        """
        return None if self.versions is None else self.versions.visible_rows(documents, partitions, versions)

    def _to_file_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.versions is None else self.versions.file_rows(rows)

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of the documents at `rows`, int64."""
        return np.asarray(self._table.take("doc_id", self._to_file_rows(rows)))

    def columns(self, rows: np.ndarray) -> dict[str, Column]:
        """Return the features of the documents at `rows` (int64 [n]) that models read, as columns."""
        return {name: self.column(name, rows) for name in self._schema.doc}

    def column(self, feature: str, rows: np.ndarray) -> Column:
        """Return one feature of the documents at `rows` (int64 [n])."""
        column = self._table.take(feature, self._to_file_rows(rows))
        earlier = (self._encoded_by or {}).get(feature)  # columns that only filter are those of the whole schema
        return column if earlier is None else earlier.without_unknown(column)

    def codes(self, feature: str, rows: np.ndarray) -> np.ndarray:
        """Return the codes of one categorical feature at `rows`."""
        return np.asarray(self.column(feature, rows))

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the document keys (the ids in the source table) at `rows`."""
        return self._table.strings("doc_key", self._to_file_rows(rows))

    def titles(self, rows: np.ndarray) -> list[str]:
        """Return the titles at `rows`."""
        return self._table.strings("doc_title", self._to_file_rows(rows))

    @cached_property
    def _by_id(self) -> np.ndarray:
        return np.argsort(self.doc_ids, kind="stable")

    def rows_by_key(self, keys: Sequence[str]) -> np.ndarray:
        """Return the rows of documents by key, int64, -1 for an unknown key."""
        rows = self.rows_by_id(np.array([hash64(key) for key in keys], np.int64))
        matched = np.flatnonzero(rows >= 0)
        is_same = [
            key == keys[position] for position, key in zip(matched.tolist(), self.keys(rows[matched]), strict=True)
        ]
        rows[matched[~np.array(is_same, bool)]] = -1  # a hash collision
        return rows

    def rows_by_id(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of documents by id, int64, -1 for an unknown id."""
        if not len(ids) or not self.num_docs:
            return np.full(len(ids), -1, np.int64)
        position = np.searchsorted(self.doc_ids, ids, sorter=self._by_id)
        rows = self._by_id[np.minimum(position, self.num_docs - 1)]
        return np.where(self.doc_ids[rows] == ids, rows, -1)


def candidate_rows(numbers: np.ndarray, withdrawn: np.ndarray) -> np.ndarray:
    """Convert numbers among the documents that are not withdrawn to catalogue rows, int64."""
    return np.asarray(numbers + np.searchsorted(withdrawn - np.arange(len(withdrawn)), numbers, "right"))
