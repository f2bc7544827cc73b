"""Where the queries of a bulk job come from: all users of a dataset, the rows of a split, or a table.

Shapes: R rows of the source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.artifacts.checkpoint import folder_checksums
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.mapped import MappedTable
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Ragged, histories_of, stored
from bigdssm.features.columns import RowCheck, SourceBatch, strings, value_lists
from bigdssm.features.given import columns_of
from bigdssm.hashing import file_checksum, hash64, json_checksum
from bigdssm.log import get_logger
from bigdssm.retrieval.search import histories
from bigdssm.tables.registry import read_table

log = get_logger(__name__)


@dataclass(frozen=True)
class BulkQueries:
    """Some queries of a source."""

    rows: np.ndarray  # int64 [m]: their numbers in the source
    keys: list[str] | None  # what names each, where something does
    columns: dict[str, Column]
    seen: Ragged  # catalogue rows of each one's events, oldest first


class QuerySource(ABC):
    """Rows 0 … num_rows − 1, each of them a query."""

    identity: str  # of what is asked for, beside the dataset
    num_rows: int
    _dataset: Dataset

    def limited_to(self, dataset: Dataset) -> QuerySource:
        """Return the same queries as `dataset` encodes them, see `Dataset.limited_to`."""
        limited = copy(self)
        limited._dataset = dataset
        return limited

    @abstractmethod
    def read(self, first: int, last: int) -> BulkQueries:
        """Return the queries of the rows [first, last); what cannot be used is left out."""


class Users(QuerySource):
    """Each user of a dataset once, with all events in the history."""

    identity = "users"

    def __init__(self, dataset: Dataset) -> None:
        """Raises DataError: the dataset has none."""
        if dataset.sequences is None:
            raise DataError(f"{dataset.dir} holds pairs, no users; recommend for a split or a table instead")
        self._dataset, self._table = dataset, dataset.sequences
        ids = self._table.whole("query_id")[::-1]  # a later partition knows more of a user
        self._rows = np.sort(len(ids) - 1 - np.unique(ids, return_index=True)[1])
        self.num_rows = len(self._rows)

    def read(self, first: int, last: int) -> BulkQueries:
        """Return the queries of some users."""
        rows = self._rows[first:last]
        columns: dict[str, Column] = {
            name: self._dataset.query_column(self._table, name, rows) for name in stored(self._dataset.schema.query)
        }
        seen = _events(self._table, rows)
        columns |= histories(self._dataset, seen)
        return BulkQueries(np.arange(first, last), self._table.strings("query_key", rows), columns, seen)


class SplitRows(QuerySource):
    """The rows of a split, as they are evaluated: what a row asks for is not in its history."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        """Raises DataError: no such split, or rows of several queries."""
        dataset.index(split)
        if dataset.num_queries(split) != dataset.num_rows(split):
            raise DataError(f"{dataset.dir}: rows of split {split} give several queries each; take validation or test")
        self._dataset, self._split = dataset, split
        self.identity, self.num_rows = f"split {split}", dataset.num_rows(split)

    def read(self, first: int, last: int) -> BulkQueries:
        """Return the queries of some rows."""
        rows = next(self._dataset.between(self._split, first, last, last - first))
        keys = None
        if rows.sequences is not None and rows.sequence is not None:
            keys = rows.sequences.strings("query_key", rows.sequence)
        seen = Ragged(*rows.seen_ragged())
        if self._dataset.schema.siamese:
            seen = Ragged.of_lists(_own(self._dataset, rows.query_ids), np.int64)
        return BulkQueries(rows.row_ids, keys, rows.query, seen)


class TableRows(QuerySource):
    """The rows of a table, with the columns that make_shards reads query features from."""

    def __init__(self, dataset: Dataset, path: Path, key_column: str | None, events_column: str | None) -> None:
        """`events_column` lists the keys of the documents of each history, oldest first; unknown ones are skipped.

        Raises ConfigError: histories without such a column, or the other way round; DataError: no readable table, or a
        column that it lacks.
        """
        if bool(histories_of(dataset.schema.query)) != (events_column is not None):
            needed = "none, as the model's queries have no" if events_column else "the documents of the queries'"
            raise ConfigError(f"--events-column {events_column}: needs {needed} histories")
        self._dataset, features = dataset, stored(dataset.schema.query)
        self._key_column, self._events_column = key_column, events_column
        wanted = {column: f"the feature {name}" for name, f in features.items() for column in f.source_columns}
        options = {"--key-column": key_column, "--events-column": events_column}
        wanted |= {column: option for option, column in options.items() if column is not None}
        tables = [batch.table for batch in read_table(path, wanted, _warn)]
        self._table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        self._path, self.num_rows = path, self._table.num_rows
        content = json_checksum(folder_checksums(path)) if path.is_dir() else file_checksum(path)
        self.identity = f"table {content} {key_column} {events_column}"

    def read(self, first: int, last: int) -> BulkQueries:
        """Return the queries of some rows."""
        rows = np.arange(first, last)
        batch = SourceBatch(str(self._path), self._table.slice(first, last - first), rows + 1)
        check = RowCheck(batch, _warn)
        keys = None if self._key_column is None else strings(check, self._key_column).to_pylist()
        seen = Ragged(np.zeros(0, np.int64), np.zeros(len(rows) + 1, np.int64))
        if self._events_column is not None:
            lists = value_lists(check, self._events_column, " ")
            found = self._dataset.catalogue.find(lists.flatten().to_pylist())
            kept = np.concatenate([[0], np.cumsum(found >= 0)])
            seen = Ragged(found[found >= 0], kept[np.asarray(lists.offsets)])
        if keys is not None and self._dataset.schema.siamese:
            ids = np.array([hash64(key) for key in keys], np.int64)
            seen = Ragged.of_lists(_own(self._dataset, ids), np.int64)
        features = stored(self._dataset.schema.query)
        columns = columns_of(batch, features, self._dataset.tokenizer, _warn) if features else {}
        return BulkQueries(rows, keys, columns | histories(self._dataset, seen), seen)


def _own(dataset: Dataset, ids: np.ndarray) -> list[np.ndarray]:
    """Return the catalogue row of the document that each query is, none where there is no such document."""
    return [row[row >= 0] for row in dataset.catalogue.rows_of(ids)[:, None]]


def _events(table: MappedTable, rows: np.ndarray) -> Ragged:
    length = table.lengths("items", rows)
    events = table.take_slices("items", rows, np.zeros_like(length), length)
    return Ragged(events.values.astype(np.int64), events.offsets)


def _warn(file: str, row: int, reason: str, left_out: bool = True) -> None:
    log.warning("%s, row %d: %s", file, row, reason)
