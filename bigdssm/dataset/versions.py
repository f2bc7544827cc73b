"""Documents whose features changed: which rows of a catalogue's files are newer versions of which documents.

A document keeps its number, which is all that blocks, sequences and counts name. The first versions of all documents
stand in the catalogue's files in the order of their numbers, newer ones in files behind those. A partition's rows see
a document as it was when the partition was added or, where versions have times, as it was at each event, of which the
sequences name the version; who goes over all documents sees each once, as it is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.partition import inside
from bigdssm.errors import DataError

DOCUMENT_COLUMN = "document"  # of a file of versions: whose version a row is
SINCE_COLUMN = "since"  # of all files of a catalogue with times: from when on a row holds


@dataclass(frozen=True)
class CatalogueFile:
    """One file of a catalogue."""

    path: Path
    rows: int
    checksum: str
    since: int | None = None  # of versions: the number of the partition whose rows are the first to see them
    first_doc: int = 0  # of versions: where the documents of their dataset begin


def catalogue_files(folder: Path, content: Mapping[str, Any]) -> list[CatalogueFile]:
    """Return the catalogue's files of the dataset in `folder`, those of versions last; `content` is its dataset.json.

    Raises DataError where it is damaged.
    """
    known: list[str] = content["partitions"]
    files = [
        CatalogueFile(inside(folder, part["file"]), part["rows"], part["checksum"]) for part in content["catalogue"]
    ]
    for part in content.get("versions", []):
        if part["since"] not in known:
            raise DataError(f"{folder}/dataset.json is damaged: {part['file']} is of no partition; copy it again")
        since = known.index(part["since"])
        files.append(CatalogueFile(inside(folder, part["file"]), part["rows"], part["checksum"], since))
    return files


def distinct(document: np.ndarray) -> np.ndarray:
    """Return the distinct documents of versions, ascending: np.unique hashes, this merges the runs that files are."""
    whose = np.sort(document, kind="stable")
    return whose[np.flatnonzero(np.diff(whose, prepend=-1))]


class Versions:
    """Finds versions by document.

    A *row* is a document's number, which stands for its newest version, or the name of an earlier version: a number
    behind all documents, which holds while the dataset is open.
    """

    def __init__(self, num_docs: int, times: np.ndarray, begin: np.ndarray, at: np.ndarray) -> None:
        """All versions of the documents that have several: from when on each holds, and where the files have it.

        `times` float64 [t], ascending: all that versions hold from; `begin` int64 [n], ascending: document · (t + 1) +
        how many of `times` are not after the version's own, 0 for a document's oldest; `at` int64 [n]: its row there.
        """
        self.num_docs, self.times, self.begin, self.at = num_docs, times, begin, at
        self._steps = len(times) + 1
        self._document = begin // self._steps

    @classmethod
    def of(cls, num_docs: int, document: np.ndarray, since: np.ndarray, first: np.ndarray | None = None) -> Versions:
        """Return the newer versions in files, in order, and the first versions of the same documents.

        `document` int64, `since` float64 [versions]: whose each is, and from which time or partition on. `first`
        float64 [distinct documents]: the same of the first versions, in the order of their numbers; None: ever. Of
        versions of one time the later in the files is newer.
        """
        changed = distinct(document)
        first = np.full(len(changed), -np.inf) if first is None else first
        times, nth = np.unique(np.concatenate([first, since]), return_inverse=True)
        whose = np.concatenate([changed, document])
        at = np.concatenate([changed, num_docs + np.arange(len(document))])
        begin = whose * (len(times) + 1) + nth + 1
        order = np.argsort(begin, kind="stable")  # merges the runs that files are
        begin, whose = begin[order], whose[order]
        oldest = np.flatnonzero(np.diff(whose, prepend=-1))
        begin[oldest] = whose[oldest] * (len(times) + 1)
        return cls(num_docs, times, begin, at[order])

    @classmethod
    def read(cls, files: Sequence[CatalogueFile], *, dated: bool) -> Versions | None:
        """Return the versions among a catalogue's files, which have times or not; None: there are no versions.

        Raises DataError on versions of no document.
        """
        firsts = [file for file in files if file.since is None]
        newer = [file for file in files if file.since is not None]
        if not newer:
            return None
        num_docs = sum(file.rows for file in firsts)
        documents = []
        for file in newer:
            documents.append(MappedTable([file.path]).whole(DOCUMENT_COLUMN) + file.first_doc)
            if len(documents[-1]) and (documents[-1].min() < 0 or documents[-1].max() >= num_docs):
                raise DataError(f"{file.path} has versions of documents that the catalogue has not; copy it again")
        document = np.concatenate(documents)
        if not dated:  # a feature may be named as the times are
            since = np.repeat([float(file.since or 0) for file in newer], [len(some) for some in documents])
            return cls.of(num_docs, document, since)
        first = MappedTable([file.path for file in firsts]).take(SINCE_COLUMN, distinct(document))
        since = MappedTable([file.path for file in newer]).whole(SINCE_COLUMN)
        return cls.of(num_docs, document, since, np.asarray(first))

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Return where the files have the version that each row is, int64."""
        return np.where(rows < self.num_docs, self._newest(rows), rows - self.num_docs)

    def held(self, documents: np.ndarray, when: np.ndarray) -> np.ndarray:
        """Return where the files have what documents were at times, int64; before all versions, the oldest.

        `when` [documents]: times, or partitions by number.
        """
        key = documents * self._steps + np.searchsorted(self.times, when, "right")
        return self._found(np.searchsorted(self.begin, key, "right"), documents)

    def seen(self, documents: np.ndarray, partitions: np.ndarray) -> np.ndarray:
        """Return the rows of documents as the rows of partitions, by number, see them, int64."""
        return self._rows(documents, self.held(documents, partitions))

    def named(self, documents: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Return the rows of documents in these versions, by their numbers among the newer ones in the files, int64.

        −1, or a number that is not one of the document's, is its first version.
        """
        known = (versions >= 0) & (versions < len(self._document_of))
        known &= self._document_of[np.where(known, versions, 0)] == documents
        return self._rows(documents, np.where(known, self.num_docs + versions.astype(np.int64), documents))

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the documents that rows are versions of, int64."""
        place = np.where(rows < self.num_docs, rows, rows - self.num_docs)
        newer = place >= self.num_docs
        return np.where(newer, self._document_of[np.where(newer, place - self.num_docs, 0)], place)

    @cached_property
    def _document_of(self) -> np.ndarray:
        """The documents of the newer versions, int64, as the files have them."""
        newer = self.at >= self.num_docs
        found = np.empty(int(newer.sum()), np.int64)
        found[self.at[newer] - self.num_docs] = self._document[newer]
        return found

    def _rows(self, documents: np.ndarray, place: np.ndarray) -> np.ndarray:
        return np.where(place == self._newest(documents), documents, self.num_docs + place)

    def _newest(self, rows: np.ndarray) -> np.ndarray:
        return self._found(np.searchsorted(self._document, rows, "right"), rows)

    def _found(self, behind: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the places of the versions before `behind` where they are of these documents, else the first ones."""
        at = np.maximum(behind - 1, 0)
        return np.where(self._document[at] == documents, self.at[at], documents)
