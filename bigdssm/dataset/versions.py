"""Documents whose features changed: which rows of a catalogue's files are newer versions of which documents.

A document keeps its number, which is all that blocks, sequences and counts name. The first versions of all documents
stand in the catalogue's files in the order of their numbers, newer ones in files behind those. A partition's rows see
a document as it was when the partition was added; who goes over all documents sees each once, as it is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.partition import inside
from bigdssm.errors import DataError

DOCUMENT_COLUMN = "document"  # of a file of versions: whose version a row is


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


class Versions:
    """Finds versions by document.

    A *row* is a document's number, which stands for its newest version, or the name of an earlier version: a number
    behind all documents, which holds while the dataset is open.
    """

    def __init__(self, num_docs: int, document: np.ndarray, since: np.ndarray) -> None:
        """`document`, `since` int64 [versions ≥ 1]: whose each is, and from which partition on, as files have them.

        A document's later version stands behind its earlier ones.
        """
        self.num_docs, self._document_of = num_docs, document
        order = np.lexsort((since, document))
        self._document, self._at = document[order], order + num_docs
        self._steps = int(since.max(initial=0)) + 1
        self._begin = self._document * self._steps + since[order]

    @classmethod
    def read(cls, files: Sequence[CatalogueFile]) -> Versions | None:
        """Return the versions among a catalogue's files, None without any. Raises DataError on those of no document."""
        num_docs = sum(file.rows for file in files if file.since is None)
        newer = [file for file in files if file.since is not None]
        if not newer:
            return None
        documents = []
        for file in newer:
            documents.append(MappedTable([file.path]).whole(DOCUMENT_COLUMN) + file.first_doc)
            if len(documents[-1]) and (documents[-1].min() < 0 or documents[-1].max() >= num_docs):
                raise DataError(f"{file.path} has versions of documents that the catalogue has not; copy it again")
        since = np.repeat([file.since or 0 for file in newer], [len(some) for some in documents])
        return cls(num_docs, np.concatenate(documents), since)

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Return where the files have the version that each row is, int64."""
        return np.where(rows < self.num_docs, self._newest(rows), rows - self.num_docs)

    def seen(self, documents: np.ndarray, partitions: np.ndarray) -> np.ndarray:
        """Return the rows of documents as the rows of partitions, by number, see them, int64."""
        when = documents * self._steps + np.minimum(partitions, self._steps - 1)
        place = self._found(np.searchsorted(self._begin, when, "right"), documents)
        return np.where(place == self._newest(documents), documents, self.num_docs + place)

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the documents that rows are versions of, int64."""
        place = np.where(rows < self.num_docs, rows, rows - self.num_docs)
        newer = place >= self.num_docs
        return np.where(newer, self._document_of[np.where(newer, place - self.num_docs, 0)], place)

    def _newest(self, rows: np.ndarray) -> np.ndarray:
        return self._found(np.searchsorted(self._document, rows, "right"), rows)

    def _found(self, behind: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the places of the versions before `behind` where they are of these documents, else the first ones."""
        at = np.maximum(behind - 1, 0)
        return np.where((behind > 0) & (self._document[at] == documents), self._at[at], documents)
