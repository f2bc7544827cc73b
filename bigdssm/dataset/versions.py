"""Versions of documents whose features changed.

A document keeps its number, the only reference in blocks, sequences and counts. The catalogue's first files have the
first version of every document, in the order of their numbers; later files have newer versions. All documents
of a step are in their newest versions, as served: a positive in the version of its event could be recognized by any
feature that depends on time. The items of a history have the versions that were current when their partition was added
or, if versions have times, at the time of their event (stored in the sequences).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.partition import path_inside
from bigdssm.errors import DataError

DOCUMENT_COLUMN = "document"  # in files of newer versions and of withdrawals: the document number
WITHDRAWN_COLUMN = "withdrawn"  # in files of withdrawals: 1, or 0 for a document that is back
SINCE_COLUMN = "since"  # in all files of a catalogue with times: start of validity


@dataclass(frozen=True)
class CatalogueFile:
    """One file of a catalogue."""

    path: Path
    rows: int
    checksum: str
    since: int | None = None  # newer versions and withdrawals: the first partition that sees them
    first_doc: int = 0  # newer versions and withdrawals: offset of their dataset's documents


def catalogue_files(folder: Path, content: Mapping[str, Any]) -> list[CatalogueFile]:
    """List the catalogue's files, newer versions last; `content` is dataset.json.

    Raises DataError: it is damaged.
    """
    files = [
        CatalogueFile(path_inside(folder, part["file"]), part["rows"], part["checksum"])
        for part in content["catalogue"]
    ]
    return files + later_files(folder, content, "versions")


def later_files(folder: Path, content: Mapping[str, Any], kind: str) -> list[CatalogueFile]:
    """List the files of newer versions, or of withdrawals; `content` is dataset.json.

    Raises DataError: it is damaged.
    """
    known: list[str] = content["partitions"]
    files = []
    for part in content.get(kind, []):
        if part["since"] not in known:
            raise DataError(f"{folder}/dataset.json is damaged: {part['file']} belongs to no partition; copy it again")
        since = known.index(part["since"])
        files.append(CatalogueFile(path_inside(folder, part["file"]), part["rows"], part["checksum"], since))
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
    def of(cls, num_docs: int, document: np.ndarray, since: np.ndarray, first: np.ndarray | None = None) -> Versions:
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
    def read(cls, files: Sequence[CatalogueFile], *, dated: bool) -> Versions | None:
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
            since = np.repeat([float(file.since or 0) for file in newer], [len(some) for some in documents])
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

    def visible_rows(self, documents: np.ndarray, partitions: np.ndarray) -> np.ndarray:
        """Return the rows of documents in the versions visible to partitions (by number), int64."""
        return self._rows(documents, self.file_rows_at(documents, partitions))

    def version_rows(self, documents: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Return the rows of documents in explicit versions, int64.

        `versions` are numbers among the newer versions in file order; −1, or a version of another document, selects the
        first version.
        """
        known = (versions >= 0) & (versions < len(self._document_of))
        known &= self._document_of[np.where(known, versions, 0)] == documents
        return self._rows(documents, np.where(known, self.num_docs + versions.astype(np.int64), documents))

    @cached_property
    def _document_of(self) -> np.ndarray:
        """The documents of the newer versions, int64, in file order."""
        newer = self.file_row >= self.num_docs
        documents = np.empty(int(newer.sum()), np.int64)
        documents[self.file_row[newer] - self.num_docs] = self._document[newer]
        return documents

    def _rows(self, documents: np.ndarray, file_row: np.ndarray) -> np.ndarray:
        return np.where(file_row == self._newest(documents), documents, self.num_docs + file_row)

    def _newest(self, rows: np.ndarray) -> np.ndarray:
        return self._version_before(np.searchsorted(self._document, rows, "right"), rows)

    def _version_before(self, behind: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return file rows of the versions before indices `behind`, or of the first versions."""
        at = np.maximum(behind - 1, 0)
        return np.where(self._document[at] == documents, self.file_row[at], documents)
