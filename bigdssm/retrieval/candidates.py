"""Candidate windows from data instead of mining: rated documents, or a table of impressions.

Written as hard-negatives files (see hard_negatives.py), one window per query of the train split. A query's window also
holds documents of other train rows with the same query id.

Shapes: p (query, document) pairs, m queries, W window positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.keys import pair_hash
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DataError
from bigdssm.features.columns import RowCheck, strings, value_lists
from bigdssm.retrieval.embed import Share, iterate_share
from bigdssm.retrieval.hard_negatives import HardNegatives, record_dtype
from bigdssm.retrieval.mining import TrainPositives
from bigdssm.sources.opening import read_table
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import new_file, real_path
from bigdssm.utils.hashing import mix64
from bigdssm.utils.log import get_logger
from bigdssm.utils.string_hashing import hash_strings

log = get_logger(__name__)

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class CandidateRows:
    """Distinct candidate documents grouped by query, in window order."""

    queries: np.ndarray  # int64 [p]: hashed query keys, ascending
    docs: np.ndarray  # int64 [p], catalogue rows
    relevance: np.ndarray | None  # float32 [p]

    @classmethod
    def of(cls, queries: np.ndarray, docs: np.ndarray, relevance: np.ndarray | None, low: float = 0.0) -> CandidateRows:
        """Sort and deduplicate pairs: relevance of at most `low` first, else in pseudo-random order.

        A repeated pair keeps its greatest relevance.
        """
        grade = np.zeros(len(queries), np.float32) if relevance is None else relevance
        order = np.lexsort((-grade, docs, queries))
        queries, docs, grade = queries[order], docs[order], grade[order]
        first = np.append(True, (np.diff(queries) != 0) | (np.diff(docs) != 0))[: len(queries)]
        queries, docs, grade = queries[first], docs[first], grade[first]
        order = np.lexsort((mix64(queries, 0) ^ mix64(docs, 0), grade > low, queries))
        return cls(queries[order], docs[order], None if relevance is None else grade[order])

    def windows(
        self, queries: np.ndarray, excluded: tuple[np.ndarray, np.ndarray], width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return windows int32 [m, W] of the queries [m], and their relevance float32 [m, W], NaN if absent.

        excluded: (query number, catalogue row) pairs to leave out.
        """
        start, end = (np.searchsorted(self.queries, queries, side) for side in ("left", "right"))
        length = end - start
        row = np.repeat(np.arange(len(queries)), length)
        entry = np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
        retained = ~np.isin((row << 32) | self.docs[entry], (excluded[0] << 32) | excluded[1])
        row, entry = row[retained], entry[retained]
        position = np.arange(len(row)) - np.searchsorted(row, row)
        row, entry, position = row[position < width], entry[position < width], position[position < width]
        windows = np.full((len(queries), width), -1, np.int32)
        grades = np.full((len(queries), width), np.nan, np.float32)
        windows[row, position] = self.docs[entry]
        if self.relevance is not None:
            grades[row, position] = self.relevance[entry]
        return windows, grades


def write_rated(path: Path, dataset: Dataset, width: int, low: float, share: Share | None = None) -> HardNegatives:
    """Write windows of the train ratings per query id, with relevances as teacher scores.

    Ratings of at most `low` (explicit negatives) come first. Raises DataError: all windows are empty.
    """
    share = share or Share()
    columns: list[tuple[np.ndarray, ...]] = []
    for rows in iterate_share(dataset, "train", share, "ratings read"):
        if rows is not None:
            columns.append((rows.query_ids, rows.doc_rows, rows.relevance))
    query_ids, docs, relevance = (np.concatenate(column) for column in zip(*columns, strict=True))
    rated = CandidateRows.of(query_ids, docs, relevance, low)

    def of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        targets = np.arange(rows.num_queries), rows.doc_rows
        windows, grades = rated.windows(rows.query_ids, targets, width)
        return windows, np.concatenate([rows.relevance[:, None], grades], 1)

    empty = f"{dataset.dir}: no training query has a rated document other than its target, so there are no candidates"
    return _write(path, dataset, of, width, scored=True, empty=empty, share=share)


def write_candidates(
    path: Path, dataset: Dataset, table: Path, columns: tuple[str, str | None, str], width: int,
    share: Share | None = None,
) -> HardNegatives:  # fmt: skip
    """Write windows of the candidates that a table lists per query, such as impressions without a click.

    columns: the query's key, its target's key (None: a table row applies to all rows of its query), and the candidates'
    keys. Documents outside the dataset and train positives of the query id are excluded. Raises DataError: all windows
    are empty.
    """
    share, target_column = share or Share(), columns[1]
    positives = TrainPositives.of(dataset, share)
    query_column, _, candidate_column = columns
    queries, docs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    missing = 0
    options = dict(zip(columns, ("--query-column", "--positive-column", "--column"), strict=True))
    for batch in read_table(table, {column: option for column, option in options.items() if column}, _warn):
        check = RowCheck(batch, _warn)
        hashed, lists = hash_strings(strings(check, query_column)), value_lists(check, candidate_column, " ")
        if target_column is not None:
            hashed = pair_hash(hashed, dataset.catalogue.rows_by_key(strings(check, target_column).to_pylist()))
        rows = dataset.catalogue.rows_by_key(lists.flatten().to_pylist())
        queries.append(np.repeat(hashed, np.diff(np.asarray(lists.offsets)))[rows >= 0])
        docs.append(rows[rows >= 0])
        missing += int((rows < 0).sum())
    if missing:
        log.warning("%s: %d entries of column %s are no document of %s", table, missing, candidate_column, dataset.dir)
    candidates = CandidateRows.of(np.concatenate(queries), np.concatenate(docs), None)

    def of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        queries = rows.query_ids if target_column is None else pair_hash(rows.query_ids, rows.doc_rows)
        number, docs = positives.pairs(rows.query_ids)
        excluded = np.append(number, np.arange(rows.num_queries)), np.append(docs, rows.doc_rows)
        return candidates.windows(queries, excluded, width)

    empty = f"{table}: no training query of {dataset.dir} has a candidate in it; check the ids in its columns"
    return _write(path, dataset, of, width, scored=False, empty=empty, share=share)


def _write(
    path: Path, dataset: Dataset, of: Callable[[Rows], tuple[np.ndarray, np.ndarray]], width: int, *, scored: bool,
    empty: str, share: Share,
) -> HardNegatives:  # fmt: skip
    """Write `of`(train rows): windows [m, W] and, if `scored`, teacher scores [m, 1 + W].

    Raises DataError with the message `empty`: all windows are empty.
    """
    path, position, all_empty = real_path(path), 0, True
    with new_file(path) as aside:
        records_of_file = new_array(aside, record_dtype(width, scored), (dataset.num_queries("train"),))
        for first in range(0, dataset.num_rows("train"), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, dataset.num_rows("train"))
            for rows in dataset.iterate_range("train", first, last, dataset.rows_for_queries("train", ROWS_AT_ONCE)):
                records = records_of_file[position : position + rows.num_queries]
                records["query"] = rows.query_keys
                records["window"], grades = of(rows)
                if scored:
                    records["teacher"] = grades
                all_empty = all_empty and not (records["window"] >= 0).any()
                position += rows.num_queries
            share.progress("windows written", last, dataset.num_rows("train"))
        if all_empty:
            raise DataError(empty)
        records_of_file.flush()
        if position < len(records_of_file):  # rows that cannot be read
            readable = np.array(records_of_file[:position])
            with aside.open("wb") as file:
                np.save(file, readable)
        seal(aside, dataset.rows_fingerprint)
    return HardNegatives.open(path)


def _warn(file: str, row: int, reason: str, left_out: bool = True) -> None:
    log.warning("%s, row %d: %s", file, row, reason)
