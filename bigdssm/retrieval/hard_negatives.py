"""Hard negatives on disk, and their sampling per epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_BITS, Rows
from bigdssm.errors import DataError
from bigdssm.retrieval.texts import Texts
from bigdssm.utils.array_file import check_seal, new_array, seal
from bigdssm.utils.atomic import new_file
from bigdssm.utils.hashing import derive_key, mix64

REMAKE = "make it with bigdssm mine_negatives, list_candidates or score_pairs"


def window_records(queries: np.ndarray, windows: np.ndarray, teacher: np.ndarray | None = None) -> np.ndarray:
    """Return the records of int64 keys `queries` [m], which ascend, int32 `windows` and `teacher` [m, 1 + W]."""
    records = np.empty(len(queries), record_type(windows.shape[1], judged=teacher is not None))
    records["query"], records["window"] = queries, windows
    if teacher is not None:
        records["teacher"] = teacher
    return records


def write_mined(path: Path, records: np.ndarray, dataset: Dataset) -> None:
    """Write the records of `window_records` of a dataset's train rows as a file. Raises OSError."""
    with new_file(path) as aside:
        new_array(aside, records.dtype, records.shape)[:] = records
        seal(aside, dataset.fingerprint)


def record_type(width: int, judged: bool = False) -> np.dtype[np.void]:
    """Return the type of a record with a window of `width` places, and with a judge's scores where `judged`."""
    fields: list[tuple[str, type, tuple[int, ...]]] = [("query", np.int64, ()), ("window", np.int32, (width,))]
    teacher = [("teacher", np.float32, (1 + width,))] if judged else []
    return np.dtype(fields + teacher, align=True)  # else a search copies all rows


def find_keys(known: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where int64 keys [m] stand in `known`, which ascend, and which are not there: int64 [m], bool [m]."""
    at: np.ndarray = np.minimum(np.searchsorted(known, keys), max(len(known) - 1, 0))
    missing: np.ndarray = known[at] != keys if len(known) else np.ones(len(keys), bool)
    return at, missing


def rows_of_queries(dataset: Dataset, keys: np.ndarray, queries_at_once: int) -> Iterator[Rows]:
    """Yield the train rows of these queries, whose keys ascend, some at a time; what cannot be read is left out."""
    if not len(keys):
        return
    first, last = (keys[[0, -1]] >> EVENT_BITS).tolist()
    for rows in dataset.iterate_range("train", first, last + 1, dataset.rows_for_queries("train", queries_at_once)):
        asked = rows.take(np.flatnonzero(np.isin(rows.query_keys, keys)))
        if len(asked):
            yield asked


class SampledNegatives(NamedTuple):
    """What is listed for the m queries of a batch."""

    documents: np.ndarray  # int64 [m, k]: catalogue rows, -1 for none
    teacher: np.ndarray | None = None  # float32 [m, 1 + k]: a judge's scores, the query's own document's first


class HardNegatives:
    """The windows of mined queries, by key."""

    def __init__(self, records: np.ndarray, path: Path | None = None) -> None:
        """`records` as `window_records` makes them; they may be mapped from the file `path`."""
        self._records, self._path = records, path

    @classmethod
    def open(cls, path: Path) -> HardNegatives:
        """Return those of a file, mapped. Raises DataError where it is none."""
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"{path} is no file of mined negatives: {error.strerror or error}") from None
        except ValueError:  # whose advice is to open what may be a pickle
            raise DataError(f"{path} is no file of mined negatives; make it with bigdssm mine_negatives") from None
        names = records.dtype.names or ()
        width = records.dtype["window"].shape[0] if "window" in names and records.dtype["window"].shape else 0
        if not width or records.dtype != record_type(width, judged="teacher" in names):
            raise DataError(
                f"{path} is no file of mined negatives: got {records.dtype}, needs records of query and window, or of "
                "these and teacher; make it with bigdssm mine_negatives"
            )
        return cls(records, path)

    def check_against(self, dataset: Dataset) -> None:
        """Read the file whole. Raises DataError where it is damaged, or was made of another dataset."""
        if self._path is not None:
            check_seal(self._path, dataset.fingerprint, REMAKE)
        queries, window = self.queries, self._records["window"]
        if queries.min(initial=0) < 0 or (queries[1:] <= queries[:-1]).any() or window.min(initial=-1) < -1:
            raise DataError(
                f"{self._path} is no file of mined negatives: needs queries of at least 0 that ascend and documents "
                f"of at least -1, which stands for none; {REMAKE}"
            )
        row = queries[-1] >> EVENT_BITS if len(self) else -1
        document = window.max(initial=-1)
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

    @property
    def judged(self) -> bool:
        """Return whether there are a judge's scores."""
        return "teacher" in (self._records.dtype.names or ())

    @property
    def width(self) -> int:
        """Return W."""
        width: int = self._records["window"].shape[1]
        return width

    def windows(self, queries: np.ndarray) -> np.ndarray:
        """Return int32 [m, W], the windows of int64 keys [m]. Raises DataError where a query was not mined."""
        windows: np.ndarray = self._records["window"][self._places(queries)]
        return windows

    def teacher(self, queries: np.ndarray) -> np.ndarray:
        """Return float32 [m, 1 + W], a judge's scores of each query's own document and of its window, NaN for none.

        Raises DataError where a query was not mined; ask for `judged` before.
        """
        scores: np.ndarray = self._records["teacher"][self._places(queries)]
        return scores

    def _places(self, queries: np.ndarray) -> np.ndarray:
        at, missing = find_keys(self.queries, queries)
        if missing.any():
            row, place = divmod(int(queries[missing][0]), 1 << EVENT_BITS)
            raise DataError(
                f"{self._path} has no negatives for row {row} (place {place}) and {missing.sum() - 1} other queries of "
                "a batch; mine again"
            )
        return at

    def choose(
        self, rows: Rows, epoch: int, seed: int, k: int, teacher_margin: float | None = None
    ) -> SampledNegatives:
        """Return k for each query, drawn from its window; see `choose_ranks`.

        teacher_margin: what the judge puts above a query's own document less this is not drawn.
        """
        window, teacher = self.windows(rows.query_keys), self.teacher(rows.query_keys) if self.judged else None
        if teacher is not None and teacher_margin is not None:
            window = np.where(teacher[:, 1:] > teacher[:, :1] - teacher_margin, -1, window)
        places = choose_ranks(window, rows, epoch, seed, k)
        documents = take_ranks(window, places, -1).astype(np.int64)
        if teacher is None:
            return SampledNegatives(documents)
        listed = take_ranks(teacher[:, 1:], places, np.nan)
        return SampledNegatives(documents, np.concatenate([teacher[:, :1], listed], 1).astype(np.float32))

    def per_query(self) -> float:
        """Return how many negatives a query has on average."""
        return float((self._records["window"] >= 0).sum(axis=1).mean()) if len(self) else 0.0


class UniformNegatives:
    """Documents drawn uniformly from a catalogue, in place of mined ones."""

    def __init__(self, num_docs: int) -> None:
        self._num_docs = num_docs

    def choose(self, rows: Rows, epoch: int, seed: int, k: int) -> SampledNegatives:
        """Return k for each query, a function of the same as `choose_ranks`; one drawn twice is there once."""
        keys = mix64(_names(rows), derive_key(seed, epoch))
        draws = mix64(keys[:, None] ^ mix64(np.arange(k), 0), 0) % np.uint64(self._num_docs)
        drawn = np.sort(draws.astype(np.int64), axis=1)
        drawn[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = -1
        return SampledNegatives(drawn)


def choose_ranks(window: np.ndarray, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
    """Return int64 [m, k]: the places of k distinct entries of each query's `window` [m, W], -1 where it holds fewer.

    A pure function of (seed, epoch, row id) and, in a row of several queries, of the place: the same whatever the ranks
    and the steps, another draw every epoch.
    """
    query_keys = mix64(_names(rows), derive_key(seed, epoch))
    keys = mix64(query_keys[:, None] ^ mix64(np.arange(window.shape[1]), 0), 0)
    keys = np.where(window < 0, np.iinfo(np.uint64).max, keys)
    places = np.argsort(keys, axis=1, kind="stable")[:, :k]
    places = np.where(np.take_along_axis(window, places, axis=1) < 0, -1, places)
    return np.pad(places, ((0, 0), (0, k - places.shape[1])), constant_values=-1)


def choose_negatives(window: np.ndarray, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
    """Return int32 [m, k]: the entries of each query's `window` [m, W] at `choose_ranks`, -1 where there are fewer."""
    return take_ranks(window, choose_ranks(window, rows, epoch, seed, k), -1).astype(np.int32)


def take_ranks(values: np.ndarray, places: np.ndarray, absent: float) -> np.ndarray:
    """Return `values` [m, W] at `places` [m, k], `absent` where a place is -1."""
    return np.where(places < 0, absent, np.take_along_axis(values, np.maximum(places, 0), axis=1))


def _names(rows: Rows) -> np.ndarray:
    """Return what stands for each query whatever the step, int64 [m]."""
    return rows.row_ids if rows.row is None else rows.query_keys


ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ReviewedNegative:
    """What training takes for a query, its document, and a document that is none of the query's."""

    row_id: int
    query: str
    document: str
    negative: str


def sample_negatives(dataset: Dataset, mined: HardNegatives, count: int, seed: int = 0) -> list[ReviewedNegative]:
    """Return `count` negatives of evenly spaced mined queries, one each, as `choose_negatives` draws them for `seed`.

    Texts are shown as the towers read them: cut, in the tokenizer's case. Raises ConfigError where a side has no text,
    DataError where `mined` is of another dataset's rows.
    """
    texts = Texts(dataset)
    num_rows, queries = dataset.num_rows("train"), mined.queries
    if len(queries) and (last := queries[-1] >> EVENT_BITS) >= num_rows:
        raise DataError(f"negatives were mined for row {last}, but {dataset.dir} has {num_rows} train rows")
    wanted = queries[np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(np.int64)]
    found = []
    for taken in rows_of_queries(dataset, wanted, ROWS_AT_ONCE):
        negative = choose_negatives(mined.windows(taken.query_keys), taken, 0, seed, 1)[:, 0].astype(np.int64)
        own, other = (texts.documents(docs) for docs in (taken.doc_rows.astype(np.int64), np.maximum(negative, 0)))
        columns = (taken.row_ids.tolist(), texts.queries(taken), own, other, negative.tolist())
        found += [ReviewedNegative(*values) for *values, row in zip(*columns, strict=True) if row >= 0]
    return found
