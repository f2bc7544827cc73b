"""Mined (hard) negatives once they are there: the file with each query's window, and the choice of some at each epoch.

The file is a .npy of records (query int64, window int32 [W]), one a mined query of the train split, by ascending key
(see `Rows.query_keys`); a window holds catalogue rows in the order of the query's ranking, and -1 where there is none.
Fine-tuning that does not take every row mines only those to come: a few steps cost what their rows cost, and one pass
over the split for the known positives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import PLACE_BITS, Rows
from bigdssm.errors import DataError
from bigdssm.hashing import derive_key, mix64


def mined_records(queries: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Return the records of int64 keys `queries` [m], which ascend, and int32 `windows` [m, W]."""
    records = np.empty(len(queries), record_type(windows.shape[1]))
    records["query"], records["window"] = queries, windows
    return records


def record_type(width: int) -> np.dtype[np.void]:
    """Return the type of a record with a window of `width` places."""
    return np.dtype([("query", np.int64), ("window", np.int32, (width,))], align=True)  # else a search copies all rows


class MinedNegatives:
    """The windows of mined queries, by key."""

    def __init__(self, records: np.ndarray, path: Path | None = None) -> None:
        """`records` as `mined_records` makes them; they may be mapped from the file `path`."""
        self._records, self._path = records, path

    @classmethod
    def open(cls, path: Path) -> MinedNegatives:
        """Return those of a file, mapped. Raises DataError where it is none."""
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"{path} is no file of mined negatives: {error.strerror or error}") from None
        except ValueError:  # whose advice is to open what may be a pickle
            raise DataError(f"{path} is no file of mined negatives; make it with bigdssm mine_negatives") from None
        if records.dtype.names != ("query", "window"):
            raise DataError(
                f"{path} is no file of mined negatives: got {records.dtype}, needs records of query and window; "
                "make it with bigdssm mine_negatives"
            )
        return cls(records, path)

    def check_against(self, dataset: Dataset) -> None:
        """Raise DataError where they must be of another dataset: some rows are looked at, all may be terabytes."""
        row = self.queries[-1] >> PLACE_BITS if len(self) else -1
        document = self._records["window"][:: max(1, len(self) // 10_000)].max(initial=-1)
        rows, documents = dataset.num_rows("train"), dataset.catalogue.num_docs
        if row >= rows or document >= documents:
            raise DataError(
                f"{self._path} was mined for another dataset: it names row {row} and document {document}, and "
                f"{dataset.dir} has {rows} train rows and {documents} documents"
            )

    def __len__(self) -> int:
        """Return the number of mined queries."""
        return len(self._records)

    @property
    def queries(self) -> np.ndarray:
        """Return the mined queries' keys, int64, ascending."""
        keys: np.ndarray = self._records["query"]
        return keys

    def windows(self, queries: np.ndarray) -> np.ndarray:
        """Return int32 [m, W], the windows of int64 keys [m]. Raises DataError where a query was not mined."""
        at = np.minimum(np.searchsorted(self.queries, queries), max(len(self) - 1, 0))
        missing = self.queries[at] != queries if len(self) else np.ones(len(queries), bool)
        if missing.any():
            row, place = divmod(int(queries[missing][0]), 1 << PLACE_BITS)
            raise DataError(
                f"{self._path} has no negatives for row {row} (place {place}) and {missing.sum() - 1} other queries of "
                "a batch; mine again"
            )
        windows: np.ndarray = self._records["window"][at]
        return windows

    def choose(self, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
        """Return int32 [m, k] for the m queries of `rows`; see `choose_negatives`."""
        return choose_negatives(self.windows(rows.query_keys), rows, epoch, seed, k)

    def per_query(self) -> float:
        """Return how many negatives a query has on average."""
        return float((self._records["window"] >= 0).sum(axis=1).mean()) if len(self) else 0.0


class UniformNegatives:
    """Documents drawn uniformly from a catalogue, in place of mined ones."""

    def __init__(self, num_docs: int) -> None:
        self._num_docs = num_docs

    def choose(self, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
        """Return int32 [m, k], -1 where a query drew a document twice; a function of the same as `choose_negatives`."""
        keys = mix64(_names(rows), derive_key(seed, epoch))
        draws = mix64(keys[:, None] ^ mix64(np.arange(k), 0), 0) % np.uint64(self._num_docs)
        drawn = np.sort(draws.astype(np.int32), axis=1)
        drawn[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = -1
        return drawn


def choose_negatives(window: np.ndarray, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
    """Return int32 [m, k]: k distinct entries of each query's `window` [m, W], -1 where it holds fewer.

    A pure function of (seed, epoch, row id) and, in a row of several queries, of the place: the same whatever the ranks
    and the steps, another draw every epoch.
    """
    query_keys = mix64(_names(rows), derive_key(seed, epoch))
    keys = mix64(query_keys[:, None] ^ mix64(np.arange(window.shape[1]), 0), 0)
    keys = np.where(window < 0, np.iinfo(np.uint64).max, keys)
    place = np.argsort(keys, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(window, place, axis=1).astype(np.int32)
    return np.pad(chosen, ((0, 0), (0, k - chosen.shape[1])), constant_values=-1)


def _names(rows: Rows) -> np.ndarray:
    """Return what stands for each query whatever the step, int64 [m]."""
    return rows.row_ids if rows.row is None else rows.query_keys
