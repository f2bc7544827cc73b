"""Windows that are not mined but known: what a query has rated, and what it was shown and left.

They are files of hard negatives (see hard_negatives.py), one window for each query of the train split. A query's window
also holds documents of other rows of its query id, of the train split alone.

Shapes: p pairs of a query and a document, m queries, W places of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DataError
from bigdssm.features.columns import RowCheck, strings, value_lists
from bigdssm.ingest.row_keys import pair_hash
from bigdssm.ingest.sources.registry import read_table
from bigdssm.retrieval.embed import Share, pieces_of
from bigdssm.retrieval.hard_negatives import HardNegatives, record_type
from bigdssm.retrieval.mining import TrainPositives
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import new_file, real_path
from bigdssm.utils.hashing import mix64
from bigdssm.utils.log import get_logger
from bigdssm.utils.string_hashing import hash_strings

log = get_logger(__name__)

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class CandidateRows:
    """Documents by the names of queries, each once; those of a name stand in the order of their windows."""

    names: np.ndarray  # int64 [p], ascending
    docs: np.ndarray  # int64 [p], catalogue rows
    relevance: np.ndarray | None  # float32 [p], where it is known

    @classmethod
    def of(cls, names: np.ndarray, docs: np.ndarray, relevance: np.ndarray | None, low: float = 0.0) -> CandidateRows:
        """Return pairs that come in any order: those of a relevance of at most `low` first, else as if drawn.

        Of a pair that comes several times the greatest relevance counts.
        """
        grade = np.zeros(len(names), np.float32) if relevance is None else relevance
        order = np.lexsort((-grade, docs, names))
        names, docs, grade = names[order], docs[order], grade[order]
        first = np.append(True, (np.diff(names) != 0) | (np.diff(docs) != 0))[: len(names)]
        names, docs, grade = names[first], docs[first], grade[first]
        order = np.lexsort((mix64(names, 0) ^ mix64(docs, 0), grade > low, names))
        return cls(names[order], docs[order], None if relevance is None else grade[order])

    def windows(
        self, names: np.ndarray, left_out: tuple[np.ndarray, np.ndarray], width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return int32 [m, W], the documents of the names [m], and their relevance float32 [m, W], NaN for none.

        left_out: (number of the query, catalogue row) of what its window does not hold.
        """
        start, end = (np.searchsorted(self.names, names, side) for side in ("left", "right"))
        length = end - start
        row = np.repeat(np.arange(len(names)), length)
        entry = np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())
        kept = ~np.isin((row << 32) | self.docs[entry], (left_out[0] << 32) | left_out[1])
        row, entry = row[kept], entry[kept]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        row, entry, place = row[place < width], entry[place < width], place[place < width]
        windows = np.full((len(names), width), -1, np.int32)
        grades = np.full((len(names), width), np.nan, np.float32)
        windows[row, place] = self.docs[entry]
        if self.relevance is not None:
            grades[row, place] = self.relevance[entry]
        return windows, grades


def write_rated(path: Path, dataset: Dataset, width: int, low: float, share: Share | None = None) -> HardNegatives:
    """Write windows of what each query id has rated in the train split, and with them the relevances as a judge's.

    What it rated at most `low`, its explicit negatives, comes first. Raises DataError where all windows are empty.
    """
    share = share or Share()
    columns: list[tuple[np.ndarray, ...]] = []
    for rows in pieces_of(dataset, "train", share, "ratings read"):
        if rows is not None:
            columns.append((rows.query_ids, rows.doc_rows, rows.relevance))
    query_ids, docs, relevance = (np.concatenate(column) for column in zip(*columns, strict=True))
    rated = CandidateRows.of(query_ids, docs, relevance, low)

    def of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        own = np.arange(rows.num_queries), rows.doc_rows
        windows, grades = rated.windows(rows.query_ids, own, width)
        return windows, np.concatenate([rows.relevance[:, None], grades], 1)

    nothing = f"{dataset.dir}: no train query has rated more than its own document, so that there is nothing to list"
    return _write(path, dataset, of, width, judged=True, nothing=nothing, share=share)


def write_candidates(
    path: Path, dataset: Dataset, table: Path, columns: tuple[str, str | None, str], width: int,
    share: Share | None = None,
) -> HardNegatives:  # fmt: skip
    """Write windows of the documents that a table lists for queries, such as those shown and left.

    columns: of the query's key, of its own document's (None: a row of the table is of all rows of its query), and of
    the documents' keys. What has no row in the dataset is left out, and so are the train positives of a query id.
    Raises DataError where all windows are empty.
    """
    share, own_column = share or Share(), columns[1]
    positives = TrainPositives.of(dataset, share)
    given = _read(dataset, table, columns)

    def of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        names = rows.query_ids if own_column is None else pair_hash(rows.query_ids, rows.doc_rows)
        asked, docs = positives.pairs(rows.query_ids)
        left_out = np.append(asked, np.arange(rows.num_queries)), np.append(docs, rows.doc_rows)
        return given.windows(names, left_out, width)

    nothing = f"{table}: no train query of {dataset.dir} has a document there; look at the ids in its columns"
    return _write(path, dataset, of, width, judged=False, nothing=nothing, share=share)


def _read(dataset: Dataset, table: Path, columns: tuple[str, str | None, str]) -> CandidateRows:
    query, own, listed = columns
    names, docs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    missing = 0
    options = dict(zip(columns, ("--query-column", "--own-column", "--column"), strict=True))
    for batch in read_table(table, {column: option for column, option in options.items() if column}, _warn):
        check = RowCheck(batch, _warn)
        named, lists = hash_strings(strings(check, query)), value_lists(check, listed, " ")
        if own is not None:
            named = pair_hash(named, dataset.catalogue.find(strings(check, own).to_pylist()))
        found = dataset.catalogue.find(lists.flatten().to_pylist())
        names.append(np.repeat(named, np.diff(np.asarray(lists.offsets)))[found >= 0])
        docs.append(found[found >= 0])
        missing += int((found < 0).sum())
    if missing:
        log.warning("%s: %d entries of column %s name no document of %s", table, missing, listed, dataset.dir)
    return CandidateRows.of(np.concatenate(names), np.concatenate(docs), None)


def _write(
    path: Path, dataset: Dataset, of: Callable[[Rows], tuple[np.ndarray, np.ndarray]], width: int, *, judged: bool,
    nothing: str, share: Share,
) -> HardNegatives:  # fmt: skip
    """Write what `of` makes of the rows of the train split: windows [m, W], and where judged a judge's [m, 1 + W].

    Raises DataError, which says `nothing`, where all windows are empty.
    """
    path, at, empty = real_path(path), 0, True
    with new_file(path) as aside:
        whole = new_array(aside, record_type(width, judged), (dataset.num_queries("train"),))
        for first in range(0, dataset.num_rows("train"), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, dataset.num_rows("train"))
            for rows in dataset.iterate_range("train", first, last, dataset.rows_for_queries("train", ROWS_AT_ONCE)):
                records = whole[at : at + rows.num_queries]
                records["query"] = rows.query_keys
                records["window"], grades = of(rows)
                if judged:
                    records["teacher"] = grades
                empty = empty and not (records["window"] >= 0).any()
                at += rows.num_queries
            share.progress("windows written", last, dataset.num_rows("train"))
        if empty:
            raise DataError(nothing)
        whole.flush()
        if at < len(whole):  # rows that cannot be read
            kept = np.array(whole[:at])
            with aside.open("wb") as file:
                np.save(file, kept)
        seal(aside, dataset.fingerprint)
    return HardNegatives.open(path)


def _warn(file: str, row: int, reason: str, left_out: bool = True) -> None:
    log.warning("%s, row %d: %s", file, row, reason)
