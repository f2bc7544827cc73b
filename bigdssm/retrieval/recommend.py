"""Bulk recommendation: the best documents of many queries as Parquet files, by any number of ranks.

OUT/    part-0000000.parquet … (ROW_SCHEMA, a row per query and document, best first), meta.json

A part holds the queries of one shard, is written atomically and does not depend on the rank, so a killed job resumes
with the missing parts (see shards.py).
"""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from bigdssm.checkpoints.checkpoint import folder_checksums
from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import FORGOTTEN_ID
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Feature, Ragged, encode_values, histories_of, stored_features
from bigdssm.features.canonical import columns_of
from bigdssm.features.columns import RowCheck, SourceBatch, strings, value_lists
from bigdssm.features.ragged import gather_ranges, joined
from bigdssm.features.vector import Vector
from bigdssm.retrieval.embed import encode_columns, item_contents, query_vectors
from bigdssm.retrieval.index import Index
from bigdssm.retrieval.queries import PastEvents, check_now, excluded_rows, histories, request_columns
from bigdssm.retrieval.shards import ShardedFolder, Share
from bigdssm.sources.opening import log_row, read_table
from bigdssm.utils.atomic import check_replaceable, new_file, real_path, write_json
from bigdssm.utils.device import device_of
from bigdssm.utils.hashing import file_checksum, hash64, hash_strings, json_checksum
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

FORMAT, META_FILE = 1, "meta.json"
ROW_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the source
        ("query", pa.string()),  # key of the user or table row; null in a split of pairs
        ("rank", pa.int32()),  # from 1
        ("document", pa.dictionary(pa.int32(), pa.string())),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True)
class RecommendOptions:
    """Options of `recommend`."""

    top: int = 10
    filter: str | None = None  # see `queries.Filters`
    exclude_seen: bool | None = None  # None: the model's data.exclude_seen

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"--top {self.top}: needs at least 1")


@dataclass(frozen=True)
class RecommendReport:
    """Result of `recommend`."""

    queries: int
    resumed_shards: int  # finished by an earlier run
    seconds: float
    finished: bool  # True on the rank that finished the folder


def recommend(
    out: Path,
    folder: ModelFolder,
    index: Index,
    dataset: Dataset,
    source: "QuerySource",
    options: RecommendOptions,
    work: Share,
    *,
    exclusions: "Exclusions | None" = None,
    overwrite: bool = False,
) -> RecommendReport:
    """Write this rank's share of the recommendations for all queries of `source` into the folder `out`.

    exclusions: documents that must not be recommended, by the keys of queries. overwrite: `out` may hold something
    else; its files with other names are kept. Raises: CheckpointError: model, index and dataset do not match;
    ConfigError: `out` holds something else, or an invalid filter; DataError: no queries, or a vector is not finite.
    """
    index.check_model(folder.doc_checksum)
    exclude = folder.config.data.exclude_seen if options.exclude_seen is None else options.exclude_seen
    view = folder.view(dataset)
    if folder.model.content_ids:
        folder.model.set_contents(item_contents(folder.model, view, device_of(folder.model)))
    source = source.with_dataset(view, exclude)
    index = index.of_dataset(dataset)
    out = real_path(out)
    check_replaceable(
        out,
        META_FILE,
        lambda meta: meta.get("kind") == "recommendations",
        "does not hold recommendations",
        overwrite=overwrite,
    )
    if not source.num_rows:
        raise DataError(f"{source.identity} of {dataset.dir}: no queries")
    allowed = None if options.filter is None or index.filters is None else index.filters.allowed(options.filter)
    job = {
        "kind": "recommendations", "format": FORMAT, **asdict(options), "exclude_seen": exclude,
        "source": source.identity, "model": folder.checksum, "index": index.meta.files,
        "dataset": dataset.rows_fingerprint, **({} if exclusions is None else {"exclusions": exclusions.identity}),
    }  # fmt: skip
    document_keys = index.keys.combine_chunks()
    started, queries = time.perf_counter(), 0
    shards = ShardedFolder(out, job, source.num_rows, work, own=(META_FILE, "part-*.parquet"))
    for shard, first, last in shards.pending("shards recommended"):
        batch = source.read(first, last)
        top = min(options.top, index.meta.num_docs)
        scores, rows = np.zeros((0, top), np.float32), np.zeros((0, top), np.int64)
        if len(batch.rows):
            vectors = encode_columns(
                folder.schema.query, batch.columns, partial(query_vectors, folder.model), device=device_of(folder.model)
            ).numpy()
            if not np.isfinite(vectors).all():
                raise DataError(f"vectors of the queries {batch.rows[0]} to {batch.rows[-1]} hold NaN or inf")
            excluded = batch.excluded if exclusions is None else joined(batch.excluded, exclusions.of(batch.keys))
            per_query = [excluded[i] for i in range(len(excluded))]
            scores, rows = index.nearest(vectors, top, folder.doc_checksum, per_query, allowed)
        with new_file(shards.aside / f"part-{shard:07d}.parquet") as temporary:
            parquet.write_table(_table(batch, scores, rows, document_keys), temporary)
        queries += len(batch.rows)
    finished = shards.finish(lambda temporary: write_json(temporary / META_FILE, {**job, "queries": source.num_rows}))
    return RecommendReport(queries, shards.resumed, time.perf_counter() - started, finished)


def write_csv(parts: Path, file: Path) -> None:
    """Convert the recommendations in the folder `parts` to one CSV file, and remove the folder."""
    document = ROW_SCHEMA.get_field_index("document")
    plain = ROW_SCHEMA.set(document, pa.field("document", pa.string()))
    with new_file(file) as temporary, csv.CSVWriter(temporary, plain) as writer:
        for part in sorted(parts.glob("part-*.parquet")):
            writer.write_table(parquet.read_table(part).cast(plain))
    shutil.rmtree(parts)


def _table(batch: "QueryBatch", scores: np.ndarray, rows: np.ndarray, document_keys: pa.StringArray) -> pa.Table:
    """Return search results as a table of ROW_SCHEMA."""
    present = rows >= 0
    query, rank = np.nonzero(present)  # ordered by query, then by rank
    distinct, code = np.unique(rows[present], return_inverse=True)
    documents = pa.DictionaryArray.from_arrays(pa.array(code, pa.int32()), document_keys.take(pa.array(distinct)))
    keys = pa.nulls(len(query), pa.string()) if batch.keys is None else pa.array(batch.keys).take(pa.array(query))
    columns = [pa.array(batch.rows[query]), keys, pa.array(rank + 1, pa.int32()), documents, pa.array(scores[present])]
    return pa.table(columns, schema=ROW_SCHEMA)


def _of_columns(features: Mapping[str, Feature]) -> dict[str, Feature]:
    """Return the features as read from their columns: without matrices, whose rows are those of the training table."""
    return {name: replace(f, matrix=None) if isinstance(f, Vector) else f for name, f in features.items()}


@dataclass(frozen=True)
class QueryBatch:
    """Consecutive queries of a source."""

    rows: np.ndarray  # int64 [m]: row numbers in the source
    keys: list[str] | None  # query keys, if the source has them
    columns: dict[str, Column]
    excluded: Ragged  # catalogue rows that must not be recommended


class QuerySource(ABC):
    """A source of queries, rows 0 … num_rows − 1."""

    identity: str  # identifies the queries within the dataset
    num_rows: int
    _dataset: Dataset
    _exclude_seen: bool | str = True

    def with_dataset(self, dataset: Dataset, exclude_seen: bool | str) -> "QuerySource":
        """Return the same queries with the features of `dataset`, see `Dataset.with_schema`, and these exclusions."""
        source = copy(self)
        source._dataset, source._exclude_seen = dataset, exclude_seen
        return source

    @abstractmethod
    def read(self, first: int, last: int) -> QueryBatch:
        """Read the queries of the rows [first, last), without unusable ones."""


class Users(QuerySource):
    """The distinct users of a dataset, with all events in the history."""

    identity = "users"

    def __init__(self, dataset: Dataset, now: float | None = None, context: Mapping[str, str] | None = None) -> None:
        """With `now`, the events up to it; `context`: features of the requests (data.request), for all users.

        Raises: DataError: the dataset has no users; ConfigError: `context` or `now` is invalid, or `now` and no times.
        """
        if dataset.sequences is None:
            raise DataError(f"{dataset.dir} holds pairs, no users; recommend for a split or a table instead")
        if now is not None and not dataset.has_times:
            raise ConfigError(f"--now {now}: the events of {dataset.dir} have no times; leave --now out")
        self._dataset, self._table, self._now = dataset, dataset.sequences, now
        self._context = _context(dataset, now, context or {})
        self.identity += _identity(now, context)
        ids = self._table.column("query_id")[::-1]  # the latest partition has a user's full history
        users, newest = np.unique(ids, return_index=True)
        self._rows = np.sort(len(ids) - 1 - newest[users != FORGOTTEN_ID])  # table rows of the reversed ones
        self.num_rows = len(self._rows)

    def read(self, first: int, last: int) -> QueryBatch:
        """Read the queries of users [first, last)."""
        rows = self._rows[first:last]
        stored = {name: self._table.take(name, rows) for name in stored_features(self._dataset.schema.query)}
        columns = self._dataset.limited_query(stored)
        past = PastEvents.of_users(self._dataset, self._table, rows, self._now)
        columns |= histories(self._dataset, past)
        columns |= request_columns(self._dataset, past, self._context, self._now)
        excluded = excluded_rows(self._dataset, past, self._exclude_seen, self._now)
        return QueryBatch(np.arange(first, last), self._table.strings("query_key", rows), columns, excluded)


class SplitRows(QuerySource):
    """The rows of a split, as in evaluation: histories end before the target."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        """Raises DataError: no such split, or rows with several queries."""
        dataset.index(split)
        if dataset.has_segments(split):
            raise DataError(f"{dataset.dir}: rows of split {split} have several queries each; use validation or test")
        self._dataset, self._split = dataset, split
        self.identity, self.num_rows = f"split {split}", dataset.num_rows(split)

    def read(self, first: int, last: int) -> QueryBatch:
        """Read the queries of the rows [first, last)."""
        rows = next(self._dataset.iterate_range(self._split, first, last, last - first))
        keys = None
        if rows.sequences is not None and rows.sequence is not None:
            keys = rows.sequences.strings("query_key", rows.sequence)
        later = self._dataset.later_items(self._dataset.request_times(rows))
        excluded = joined(self._dataset.excluded(rows, self._exclude_seen), later)
        if self._dataset.schema.siamese and self._exclude_seen:
            excluded = Ragged.of_lists(_query_documents(self._dataset, rows.query_ids), np.int64)
        return QueryBatch(rows.row_ids, keys, rows.inputs, excluded)


class TableRows(QuerySource):
    """The rows of a table with the columns of make_shards' query features."""

    def __init__(
        self, dataset: Dataset, path: Path, key_column: str | None, events_column: str | None, now: float | None = None,
        context: Mapping[str, str] | None = None, exclude_column: str | None = None,
    ) -> None:  # fmt: skip
        """`events_column` lists document keys of the history, oldest first; unknown keys are skipped.

        `exclude_column` lists keys of documents that must not be recommended; unknown ones are counted in the log.
        now, context: time and features of the requests, for all rows. Raises: ConfigError: the model has histories and
        there is no such column, or vice versa, or `now` or `context` is invalid; DataError: the table is not readable,
        or lacks a column.
        """
        self._now, self._context = now, _context(dataset, now, context or {})
        if bool(histories_of(dataset.schema.query)) != (events_column is not None):
            needed = "the documents of the queries' histories"
            if events_column:
                needed = "none, as the model's queries have no histories"
            raise ConfigError(f"--events-column {events_column}: needs {needed}")
        self._dataset, features = dataset, _of_columns(stored_features(dataset.schema.query))
        self._key_column, self._events_column = key_column, events_column
        required = {column: f"the feature {name}" for name, f in features.items() for column in f.source_columns}
        options = {"--key-column": key_column, "--events-column": events_column, "--exclude-column": exclude_column}
        required |= {column: option for option, column in options.items() if column is not None}
        batches = list(read_table(path, required, log_row))
        try:
            tables = pa.concat_tables([batch.table for batch in batches], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"{path}: the types of a column differ between its parts: {error}; use one type") from None
        self._table = tables.combine_chunks()
        self._rows = np.concatenate([batch.rows for batch in batches])  # from 1, without unusable ones
        self._path, self.num_rows = path, self._table.num_rows
        self.identity = f"table {_table_checksum(path)} {key_column} {events_column}{_identity(now, context)}"
        self._excluded = Ragged(np.zeros(0, np.int64), np.zeros(self.num_rows + 1, np.int64))
        if exclude_column is not None:
            self.identity += f" exclude={exclude_column}"
            check = RowCheck(SourceBatch(str(path), self._table, self._rows), log_row)
            lists = value_lists(check, exclude_column, " ")
            docs = _catalogue_rows(dataset, lists.flatten().to_pylist(), f"{path}, column {exclude_column!r}")
            self._excluded = _without_unknown(lists, docs)

    def with_dataset(self, dataset: Dataset, exclude_seen: bool | str) -> QuerySource:
        """As of `QuerySource`. Raises ConfigError: exclusions by features or times, which events of a table lack."""
        by_item = isinstance(exclude_seen, bool) and (exclude_seen or not dataset.rules.visit.is_set)
        if self._events_column is not None and not by_item:
            raise ConfigError(
                f"--events-column {self._events_column}: events of a table have no features or times, which the "
                "condition in data.exclude_seen, or data.visit, needs; give --seen exclude"
            )
        return super().with_dataset(dataset, exclude_seen)

    def read(self, first: int, last: int) -> QueryBatch:
        """Read the queries of the rows [first, last)."""
        rows = self._rows[first:last]
        batch = SourceBatch(str(self._path), self._table.slice(first, last - first), rows)
        check = RowCheck(batch, log_row)
        keys = None if self._key_column is None else strings(check, self._key_column).to_pylist()
        seen = Ragged(np.zeros(0, np.int64), np.zeros(len(rows) + 1, np.int64))
        if self._events_column is not None:
            lists = value_lists(check, self._events_column, " ")
            seen = _without_unknown(lists, self._dataset.catalogue.rows_by_key(lists.flatten().to_pylist()))
        features = _of_columns(stored_features(self._dataset.schema.query))
        columns = columns_of(batch, features, self._dataset.tokenizer, log_row) if features else {}
        past = PastEvents.of_items(self._dataset.schema, seen)
        columns |= request_columns(self._dataset, past, self._context, self._now)
        excluded = excluded_rows(self._dataset, past, self._exclude_seen, self._now)
        if keys is not None and self._dataset.schema.siamese and self._exclude_seen:
            ids = np.array([hash64(key) for key in keys], np.int64)
            excluded = Ragged.of_lists(_query_documents(self._dataset, ids), np.int64)
        excluded = joined(excluded, self._excluded.take(np.arange(first, last)))
        # queries count rows from 0, as every source, and messages from 1
        return QueryBatch(rows - 1, keys, columns | histories(self._dataset, past), excluded)


class Exclusions:
    """Documents that must not be recommended to some users, from a table with a row per user and document."""

    def __init__(
        self, dataset: Dataset, path: Path, user_column: str = "user_id", item_column: str = "item_id"
    ) -> None:
        """Unknown documents are skipped and counted in the log. Raises DataError: unreadable, or lacks a column."""
        columns = {user_column: "--user-column", item_column: "--item-column"}
        batches = [RowCheck(batch, log_row) for batch in read_table(path, columns, log_row)]
        users = [hash_strings(strings(check, user_column)) for check in batches]
        items = [key for check in batches for key in strings(check, item_column).to_pylist()]
        user, rows = np.concatenate(users), _catalogue_rows(dataset, items, f"{path}, column {item_column!r}")
        order = np.argsort(user, kind="stable")
        order = order[rows[order] >= 0]
        self._users, self._rows = user[order], rows[order]
        self.identity = f"{_table_checksum(path)} {user_column} {item_column}"

    def of(self, keys: Sequence[str] | None) -> Ragged:
        """Return the catalogue rows, int64, per user. Raises ConfigError: queries without keys."""
        if keys is None:
            raise ConfigError("--exclude-table needs queries with keys: --users, or --queries with --key-column")
        ids = hash_strings(pa.array(keys, pa.large_string()))
        first, end = (np.searchsorted(self._users, ids, side) for side in ("left", "right"))
        return gather_ranges(self._rows, first, end)


def _table_checksum(path: Path) -> str:
    return json_checksum(folder_checksums(path)) if path.is_dir() else file_checksum(path)


def _catalogue_rows(dataset: Dataset, keys: Sequence[str], where: str) -> np.ndarray:
    """Return the catalogue rows of documents by key, int64, -1 for unknown ones, which are counted in the log."""
    rows = dataset.catalogue.rows_by_key(keys)
    if unknown := [key for key, row in zip(keys, rows.tolist(), strict=True) if row < 0]:
        logger.warning(
            "%s: %d of %d keys are of no document, such as %r; they are skipped",
            where, len(unknown), len(keys), unknown[0],
        )  # fmt: skip
    return rows


def _without_unknown(lists: pa.ListArray, rows: np.ndarray) -> Ragged:
    """Return the catalogue rows of lists of keys; `rows` has -1 for the unknown keys, which are skipped."""
    offsets = np.append(0, np.cumsum(rows >= 0))
    return Ragged(rows[rows >= 0], offsets[np.asarray(lists.offsets)])


def _context(dataset: Dataset, now: float | None, context: Mapping[str, str]) -> dict[str, Column]:
    """Return the encoded features of requests. Raises ConfigError: an unknown one, or see `check_now`."""
    check_now(dataset, now)
    features = stored_features({name: dataset.schema.event[name] for name in dataset.schema.request})
    if unknown := sorted(context.keys() - features.keys()):
        raise ConfigError(f"--context {unknown[0]}: needs a feature of requests, of {list(features)}")
    return {name: encode_values(features[name], [features[name].parse(value)], None) for name, value in context.items()}


def _identity(now: float | None, context: Mapping[str, str] | None) -> str:
    """Return the part of a source's identity that the requests' time and features add."""
    return f" now={now} {sorted((context or {}).items())}" if now is not None or context else ""


def _query_documents(dataset: Dataset, ids: np.ndarray) -> list[np.ndarray]:
    """Return int64 [0 or 1] per query: the catalogue row of the document with the query's id."""
    return [row[row >= 0] for row in dataset.catalogue.rows_by_id(ids)[:, None]]
