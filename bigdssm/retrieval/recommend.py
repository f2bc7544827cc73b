"""Bulk recommendation: the best documents of many queries as Parquet files, by any number of ranks.

OUT/    part-0000000.parquet … (ROW_SCHEMA, a row for each document of each query, best first), meta.json

A part holds the queries of one shard. It is written aside and renamed, and holds the same rows whoever made it, so that
a killed job goes on with the parts that are missing (see shards.py).
"""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from bigdssm.checkpoints.checkpoint import folder_checksums
from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.mapped import MappedTable
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Ragged, histories_of, stored_features
from bigdssm.features.canonical import columns_of
from bigdssm.features.columns import RowCheck, SourceBatch, strings, value_lists
from bigdssm.ingest.sources.registry import read_table
from bigdssm.retrieval.embed import in_pieces, query_vectors
from bigdssm.retrieval.filters import Filters
from bigdssm.retrieval.index import Index
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.search import histories
from bigdssm.retrieval.shards import ShardedFolder, ShardWork
from bigdssm.utils.atomic import new_file, real_path, write_json
from bigdssm.utils.hashing import file_checksum, hash64, json_checksum
from bigdssm.utils.log import get_logger

FORMAT, META_FILE = 1, "meta.json"
ROW_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the source: its users in order, its rows
        ("query", pa.string()),  # the user's key, or the table's; null in a split of pairs
        ("rank", pa.int32()),  # from 1
        ("document", pa.dictionary(pa.int32(), pa.string())),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True)
class RecommendOptions:
    """Which documents a query gets."""

    top: int = 10
    filter: str | None = None  # see filters.py
    exclude_seen: bool | None = None  # none: as the model's data.exclude_seen says

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"--top {self.top}: needs at least 1")


@dataclass(frozen=True)
class RecommendReport:
    """What a call of `recommend` did."""

    queries: int
    found: int  # shards that were finished before
    seconds: float
    finished: bool  # on the rank that put the folder in place


def recommend(
    out: Path,
    folder: ModelFolder,
    index: Index,
    dataset: Dataset,
    source: QuerySource,
    wanted: RecommendOptions,
    work: ShardWork,
) -> RecommendReport:
    """Write this rank's share of the best documents of all queries of `source` into the folder `out`.

    Raises CheckpointError: model, index and dataset do not belong together; ConfigError: `out` holds something else, or
    the filter is none; DataError: no queries, or a vector that is not finite.
    """
    index.check_model(folder.checksum)
    source = source.limited_to(folder.view(dataset))
    index.check_dataset(dataset)
    out = real_path(out)
    _check_free(out)
    if not source.num_rows:
        raise DataError(f"{source.identity} of {dataset.dir}: no queries")
    filters = Filters(dataset.whole.schema, dataset.whole.catalogue)
    allowed = None if wanted.filter is None else filters.allowed(wanted.filter)
    exclude = folder.config.data.exclude_seen if wanted.exclude_seen is None else wanted.exclude_seen
    job = {
        "kind": "recommendations", "format": FORMAT, **asdict(wanted), "exclude_seen": exclude,
        "source": source.identity, "model": folder.checksum, "index": index.meta.files, "dataset": dataset.fingerprint,
    }  # fmt: skip
    documents, started, queries = index.keys.combine_chunks(), time.perf_counter(), 0
    shards = ShardedFolder(out, job, source.num_rows, work)
    for shard, first, last in shards.pending("shards recommended"):
        asked = source.read(first, last)
        scores, rows = _best(folder, index, asked, min(wanted.top, index.meta.num_docs), exclude, allowed)
        with new_file(shards.aside / f"part-{shard:07d}.parquet") as aside:
            parquet.write_table(_table(asked, scores, rows, documents), aside)
        queries += len(asked.rows)
    finished = shards.finish(lambda aside: write_json(aside / META_FILE, {**job, "queries": source.num_rows}))
    return RecommendReport(queries, shards.found, time.perf_counter() - started, finished)


def write_csv(parts: Path, file: Path) -> None:
    """Write the recommendations of the folder `parts` as one CSV file, and remove the folder."""
    document = ROW_SCHEMA.get_field_index("document")
    plain = ROW_SCHEMA.set(document, pa.field("document", pa.string()))
    with new_file(file) as aside, csv.CSVWriter(aside, plain) as writer:
        for part in sorted(parts.glob("part-*.parquet")):
            writer.write_table(parquet.read_table(part).cast(plain))
    shutil.rmtree(parts)


def _best(
    folder: ModelFolder,
    index: Index,
    asked: BulkQueries,
    top: int,
    exclude_seen: bool,
    allowed: AllowedDocuments | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, catalogue rows), both [m, top], as `Index.nearest` does."""
    if not len(asked.rows):
        return np.zeros((0, top), np.float32), np.zeros((0, top), np.int64)
    encode = partial(query_vectors, folder.model)
    vectors = in_pieces(folder.schema.query, asked.columns, folder.pad_token_id, encode).numpy()
    if not np.isfinite(vectors).all():
        raise DataError(f"vectors of the queries {asked.rows[0]} to {asked.rows[-1]} hold NaN or inf")
    excluded = [asked.seen[i] for i in range(len(asked.seen))] if exclude_seen else None
    return index.nearest(vectors, top, folder.checksum, excluded, allowed)


def _table(asked: BulkQueries, scores: np.ndarray, rows: np.ndarray, documents: pa.StringArray) -> pa.Table:
    """Return what was found as rows of ROW_SCHEMA."""
    found = rows >= 0
    query, rank = np.nonzero(found)
    known, place = np.unique(rows[found], return_inverse=True)
    names = pa.DictionaryArray.from_arrays(pa.array(place, pa.int32()), documents.take(pa.array(known)))
    keys = pa.nulls(len(query), pa.string()) if asked.keys is None else pa.array(asked.keys).take(pa.array(query))
    columns = [pa.array(asked.rows[query]), keys, pa.array(rank + 1, pa.int32()), names, pa.array(scores[found])]
    return pa.table(columns, schema=ROW_SCHEMA)


def _check_free(out: Path) -> None:
    """Raise ConfigError where `out` holds something else than recommendations."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        if json.loads((out / META_FILE).read_text(encoding="utf-8"))["kind"] == "recommendations":
            return
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ConfigError(f"{out} exists and holds no recommendations; choose another --out")


logger = get_logger(__name__)


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
        ids = self._table.column("query_id")[::-1]  # a later partition knows more of a user
        self._rows = np.sort(len(ids) - 1 - np.unique(ids, return_index=True)[1])
        self.num_rows = len(self._rows)

    def read(self, first: int, last: int) -> BulkQueries:
        """Return the queries of some users."""
        rows = self._rows[first:last]
        columns: dict[str, Column] = {
            name: self._dataset.query_column(self._table, name, rows)
            for name in stored_features(self._dataset.schema.query)
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
        rows = next(self._dataset.iterate_range(self._split, first, last, last - first))
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
        self._dataset, features = dataset, stored_features(dataset.schema.query)
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
        features = stored_features(self._dataset.schema.query)
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
    logger.warning("%s, row %d: %s", file, row, reason)
