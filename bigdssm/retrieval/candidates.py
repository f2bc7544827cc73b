"""Candidate windows from data instead of mining: rated documents, or a table of impressions.

Written as hard-negatives files (see hard_negatives.py), one window per query of the train split. A query's window also
holds documents of other train rows with the same query id.

Shapes: p (query, document) pairs, m queries, W window positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import find_sorted, pair_hash
from bigdssm.errors import DataError
from bigdssm.features.columns import RowCheck, strings, value_lists
from bigdssm.retrieval.embed import Share, iterate_share
from bigdssm.retrieval.hard_negatives import HardNegatives, TrainPositives, record_dtype
from bigdssm.sources.opening import read_table
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import new_file, real_path
from bigdssm.utils.hashing import hash_strings, mix64
from bigdssm.utils.log import get_logger

log = get_logger(__name__)

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class CandidateRows:
    """Distinct candidate documents grouped by query, in window order."""

    queries: np.ndarray  # int64 [p]: hashed query keys, ascending
    docs: np.ndarray  # int64 [p], catalogue rows
    relevance: np.ndarray | None  # float32 [p]
    shown: np.ndarray | None = None  # int32 [p]: positions where the documents were shown

    @classmethod
    def of(
        cls, queries: np.ndarray, docs: np.ndarray, relevance: np.ndarray | None, low: float = 0.0,
        shown: np.ndarray | None = None,
    ) -> "CandidateRows":  # fmt: skip
        """Sort and deduplicate pairs: relevance of at most `low` first, else in pseudo-random order.

        A repeated pair keeps its greatest relevance, and its first position.
        """
        grade = np.zeros(len(queries), np.float32) if relevance is None else relevance
        initial = np.lexsort((-grade, docs, queries))
        queries, docs, grade = queries[initial], docs[initial], grade[initial]
        first = np.append(True, (np.diff(queries) != 0) | (np.diff(docs) != 0))[: len(queries)]
        queries, docs, grade = queries[first], docs[first], grade[first]
        shown = None if shown is None else shown[initial][first]
        order = np.lexsort((mix64(queries, 0) ^ mix64(docs, 0), grade > low, queries))
        shown = None if shown is None else shown[order]
        return cls(queries[order], docs[order], None if relevance is None else grade[order], shown)

    def windows(
        self, queries: np.ndarray, excluded: tuple[np.ndarray, np.ndarray], width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return windows int32 [m, W] of the queries [m], their relevance float32, NaN if absent, and positions int32.

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
        shown = np.zeros((len(queries), width), np.int32)
        if self.shown is not None:
            shown[row, position] = self.shown[entry]
        return windows, grades, shown


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

    def of(rows: Rows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        targets = np.arange(rows.num_queries), rows.doc_rows
        windows, grades, _ = rated.windows(rows.query_ids, targets, width)
        return windows, {"teacher": np.concatenate([rows.relevance[:, None], grades], 1)}

    empty = f"{dataset.dir}: no training query has a rated document other than its target, so there are no candidates"
    return _write(path, dataset, of, record_dtype(width, scored=True), empty=empty, share=share)


def write_candidates(
    path: Path, dataset: Dataset, table: Path, columns: tuple[str, str | None, str, str | None], width: int,
    share: Share | None = None,
) -> HardNegatives:  # fmt: skip
    """Write windows of the candidates that a table lists per query, such as impressions without a click.

    columns: the query's key, its target's key (None: a table row applies to all rows of its query), the candidates'
    keys, and the positions where the target and the candidates were shown (None: not stored). Documents outside the
    dataset and train positives of the query id are excluded. Raises DataError: all windows are empty, or a list of
    positions is invalid.
    """
    share, target_column = share or Share(), columns[1]
    positives = TrainPositives.of(dataset, share)
    query_column, _, candidate_column, position_column = columns
    queries, docs, positions = ([np.zeros(0, np.int64)] for _ in range(3))
    targets, target_positions = ([np.zeros(0, np.int64)] for _ in range(2))
    missing = 0
    options = dict(zip(columns, ("--query-column", "--positive-column", "--column", "--position-column"), strict=True))
    for batch in read_table(table, {column: option for column, option in options.items() if column}, _warn):
        check = RowCheck(batch, _warn)
        hashed, lists = hash_strings(strings(check, query_column)), value_lists(check, candidate_column, " ")
        if target_column is not None:
            hashed = pair_hash(hashed, dataset.catalogue.rows_by_key(strings(check, target_column).to_pylist()))
        rows = dataset.catalogue.rows_by_key(lists.flatten().to_pylist())
        queries.append(np.repeat(hashed, np.diff(np.asarray(lists.offsets)))[rows >= 0])
        docs.append(rows[rows >= 0])
        if position_column is not None:
            own, of_candidates = _positions(table, check, position_column, lists)
            targets.append(hashed)
            target_positions.append(own)
            positions.append(of_candidates[rows >= 0])
        missing += int((rows < 0).sum())
    if missing:
        log.warning("%s: %d entries of column %s are no document of %s", table, missing, candidate_column, dataset.dir)
    shown = None if position_column is None else np.concatenate(positions)
    candidates = CandidateRows.of(np.concatenate(queries), np.concatenate(docs), None, shown=shown)
    target_keys, first = np.unique(np.concatenate(targets), return_index=True)

    def of(rows: Rows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        queries = rows.query_ids if target_column is None else pair_hash(rows.query_ids, rows.doc_rows)
        number, docs = positives.pairs(rows.query_ids)
        excluded = np.append(number, np.arange(rows.num_queries)), np.append(docs, rows.doc_rows)
        windows, _, of_windows = candidates.windows(queries, excluded, width)
        if position_column is None:
            return windows, {}
        position, present = find_sorted(target_keys, queries)
        own = np.where(present, np.concatenate(target_positions)[first][position], 0)
        return windows, {"shown": np.concatenate([own[:, None], of_windows], 1)}

    empty = f"{table}: no training query of {dataset.dir} has a candidate in it; check the ids in its columns"
    record = record_dtype(width, shown=position_column is not None)
    return _write(path, dataset, of, record, empty=empty, share=share)


def _write(
    path: Path, dataset: Dataset, of: Callable[[Rows], tuple[np.ndarray, dict[str, np.ndarray]]],
    record: np.dtype[np.void], *, empty: str, share: Share,
) -> HardNegatives:  # fmt: skip
    """Write `of`(train rows): windows [m, W], and further fields of `record`.

    Raises DataError with the message `empty`: all windows are empty.
    """
    path, position, all_empty = real_path(path), 0, True
    with new_file(path) as temporary:
        records_of_file = new_array(temporary, record, (dataset.num_queries("train"),))
        for first in range(0, dataset.num_rows("train"), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, dataset.num_rows("train"))
            for rows in dataset.iterate_range("train", first, last, dataset.rows_for_queries("train", ROWS_AT_ONCE)):
                records = records_of_file[position : position + rows.num_queries]
                records["query"] = rows.query_keys
                records["window"], further = of(rows)
                for name, values in further.items():
                    records[name] = values
                all_empty = all_empty and not (records["window"] >= 0).any()
                position += rows.num_queries
            share.progress("windows written", last, dataset.num_rows("train"))
        if all_empty:
            raise DataError(empty)
        records_of_file.flush()
        if position < len(records_of_file):  # rows that cannot be read
            readable = np.array(records_of_file[:position])
            with temporary.open("wb") as file:
                np.save(file, readable)
        seal(temporary, dataset.rows_fingerprint)
    return HardNegatives.open(path)


def _positions(table: Path, check: RowCheck, column: str, lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of a batch's targets and of its candidates `lists`. Raises DataError: invalid."""
    needed = "needs the position of the positive, then those of the documents, whole numbers of at least 1"
    values = value_lists(check, column, " ")
    wrong = np.flatnonzero(np.diff(np.asarray(values.offsets)) != 1 + np.diff(np.asarray(lists.offsets)))
    try:
        numbers = np.array(values.flatten().to_pylist(), np.int64)
    except ValueError as error:
        raise DataError(f"{table}, column {column}: {error}; {needed}") from None
    if len(wrong) or (numbers < 1).any():
        row = f"row {wrong[0]} of a batch has another number of them" if len(wrong) else f"got {numbers.min()}"
        raise DataError(f"{table}, column {column}: {row}; {needed}")
    is_own = np.zeros(len(numbers), bool)
    is_own[np.asarray(values.offsets)[:-1]] = True
    return numbers[is_own], numbers[~is_own]


def _warn(file: str, row: int, reason: str, left_out: bool = True) -> None:
    log.warning("%s, row %d: %s", file, row, reason)
