"""The catalogue (corpus): the features of all documents, memory-mapped, addressed by row.

Row d < num_docs holds the newest features of document d. If documents have changed, rows from num_docs on are all of
their versions, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

import numpy as np

from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.schema import Schema
from bigdssm.dataset.tensors import Features, to_features
from bigdssm.dataset.versions import Versions
from bigdssm.errors import DataError
from bigdssm.features import Feature
from bigdssm.features.ragged import Column
from bigdssm.utils.hashing import file_checksum, hash64

NO_ROWS = np.zeros(0, np.int64)


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
        for name in ("doc_key", "doc_id", "doc_title", *schema.doc):
            if name not in names:
                raise DataError(f"{self._table.paths[0].parent}: the catalogue has no column {name}, only {names}")

    def with_schema(self, schema: Schema) -> Catalogue:
        """Return a view encoded by an earlier schema; unknown values are out of vocabulary."""
        limited = copy(self)
        limited._encoded_by = schema.doc
        return limited

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

    def visible_rows(
        self, documents: np.ndarray, partitions: np.ndarray, versions: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Return the catalogue rows of the document versions in histories of `partitions`, int64.

        `partitions` are partition numbers; `versions`, if given, takes precedence (`Versions.version_rows`). None if no
        document has changed.
        """
        if self.versions is None:
            return None
        if versions is None:
            return self.versions.visible_rows(documents, partitions)
        return self.versions.version_rows(documents, versions)

    def _to_file_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.versions is None else self.versions.file_rows(rows)

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of the documents at `rows`, int64."""
        return np.asarray(self._table.take("doc_id", self._to_file_rows(rows)))

    def columns(self, rows: np.ndarray) -> dict[str, Column]:
        """Return the features of the documents at `rows` (int64 [n]) as columns."""
        return {name: self.column(name, rows) for name in self._schema.doc}

    def column(self, feature: str, rows: np.ndarray) -> Column:
        """Return one feature of the documents at `rows` (int64 [n])."""
        column = self._table.take(feature, self._to_file_rows(rows))
        return column if self._encoded_by is None else self._encoded_by[feature].without_unknown(column)

    def codes(self, feature: str, rows: np.ndarray) -> np.ndarray:
        """Return the codes of one categorical feature at `rows`."""
        return np.asarray(self.column(feature, rows))

    def features(self, rows: np.ndarray) -> Features:
        """Return the features of the documents at `rows` (int64 [n]) as tensors of n rows."""
        return to_features(self._schema.doc, self.columns(rows))

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
        known = np.flatnonzero(rows >= 0)
        same = [key == keys[at] for at, key in zip(known.tolist(), self.keys(rows[known]), strict=True)]
        rows[known[~np.array(same, bool)]] = -1  # a hash collision
        return rows

    def rows_by_id(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of documents by id, int64, -1 for an unknown id."""
        if not len(ids) or not self.num_docs:
            return np.full(len(ids), -1, np.int64)
        position = np.searchsorted(self.doc_ids, ids, sorter=self._by_id)
        rows = self._by_id[np.minimum(position, self.num_docs - 1)]
        return np.where(self.doc_ids[rows] == ids, rows, -1)

    def verify(self, checksums: Sequence[str]) -> None:
        """Verify the xxh3_64 checksum of every file. Raises DataError, which names the first damaged file."""
        for path, expected in zip(self._table.paths, checksums, strict=True):
            if file_checksum(path, bits=64) != expected:
                raise DataError(f"{path} is damaged: its checksum is not the one in dataset.json; copy it again")


def candidate_rows(numbers: np.ndarray, withdrawn: np.ndarray) -> np.ndarray:
    """Convert numbers among the documents that are not withdrawn to catalogue rows, int64."""
    return np.asarray(numbers + np.searchsorted(withdrawn - np.arange(len(withdrawn)), numbers, "right"))
