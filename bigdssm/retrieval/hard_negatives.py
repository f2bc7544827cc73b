"""Hard negatives on disk, and their per-epoch sampling; mining.py makes them.

Shapes: m rows or queries, W window positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import EVENT_BITS, Rows
from bigdssm.dataset.schema import find_sorted
from bigdssm.errors import DataError
from bigdssm.retrieval.reranking import Texts
from bigdssm.utils.array_file import check_seal
from bigdssm.utils.hashing import derive_key, mix64

ROWS_AT_ONCE = 1024  # whose texts are read for a review
REMAKE = "make it with bigdssm mine_negatives, list_candidates or score_pairs, by the same data.targets and data.visit"


def window_records(
    queries: np.ndarray, windows: np.ndarray, teacher: np.ndarray | None = None, shown: np.ndarray | None = None
) -> np.ndarray:
    """Build records of ascending query keys int64 [m], windows [m, W], teacher scores and positions [m, 1 + W]."""
    records = np.empty(len(queries), record_dtype(windows.shape[1], teacher is not None, shown is not None))
    records["query"], records["window"] = queries, windows
    if teacher is not None:
        records["teacher"] = teacher
    if shown is not None:
        records["shown"] = shown
    return records


def record_dtype(width: int, scored: bool = False, shown: bool = False) -> np.dtype[np.void]:
    """Return the dtype of a record: a window of `width` documents, teacher scores, and positions where it was shown."""
    fields: list[tuple[str, type, tuple[int, ...]]] = [("query", np.int64, ()), ("window", np.int32, (width,))]
    teacher = [("teacher", np.float32, (1 + width,))] if scored else []
    positions = [("shown", np.int32, (1 + width,))] if shown else []
    return np.dtype(fields + teacher + positions, align=True)  # unaligned, searchsorted copies all rows


def rows_of_queries(dataset: Dataset, keys: np.ndarray, queries_at_once: int) -> Iterator[Rows]:
    """Yield the train rows of queries given by ascending keys, in chunks; unreadable rows are skipped."""
    if not len(keys):
        return
    first, last = (keys[[0, -1]] >> EVENT_BITS).tolist()
    for rows in dataset.iterate_range("train", first, last + 1, dataset.rows_for_queries("train", queries_at_once)):
        selected = rows.take(np.flatnonzero(np.isin(rows.query_keys, keys)))
        if len(selected):
            yield selected


class SampledNegatives(NamedTuple):
    """Negatives sampled for the m queries of a batch."""

    documents: np.ndarray  # int64 [m, k]: catalogue rows, -1 if absent
    teacher: np.ndarray | None = None  # float32 [m, 1 + k]: teacher scores, the target's first
    shown: np.ndarray | None = None  # int64 [m, 1 + k]: positions where the documents were shown, from 1; 0: unknown


class HardNegatives:
    """Windows of hard negatives by query key."""

    def __init__(self, records: np.ndarray, path: Path | None = None) -> None:
        """`records` are `window_records`, possibly memory-mapped from `path`."""
        self._records, self._path = records, path

    @classmethod
    def open(cls, path: Path) -> "HardNegatives":
        """Memory-map a hard-negatives file. Raises DataError: not such a file."""
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"{path} is not a hard-negatives file: {error.strerror or error}") from None
        except ValueError:  # its text suggests allow_pickle
            raise DataError(f"{path} is not a hard-negatives file; make it with bigdssm mine_negatives") from None
        names = records.dtype.names or ()
        width = records.dtype["window"].shape[0] if "window" in names and records.dtype["window"].shape else 0
        if not width or records.dtype != record_dtype(width, "teacher" in names, "shown" in names):
            raise DataError(
                f"{path} is not a hard-negatives file: got {records.dtype}, needs records of query, window and, "
                "optionally, teacher and shown; make it with bigdssm mine_negatives"
            )
        return cls(records, path)

    def check_against(self, dataset: Dataset) -> None:
        """Validate the whole file. Raises DataError: damaged, or of another dataset."""
        if self._path is not None:
            check_seal(self._path, dataset.rows_fingerprint, REMAKE)
        queries, window = self.queries, self._records["window"]
        if queries.min(initial=0) < 0 or (queries[1:] <= queries[:-1]).any() or window.min(initial=-1) < -1:
            raise DataError(
                f"{self._path} is not a hard-negatives file: needs ascending queries of at least 0 and documents of at "
                f"least -1 (absent); {REMAKE}"
            )
        row = queries[-1] >> EVENT_BITS if len(self) else -1
        document = window.max(initial=-1)
        rows, documents = dataset.num_rows("train"), dataset.catalogue.num_docs
        if row >= rows or document >= documents:
            raise DataError(
                f"{self._path} was made for another dataset: it contains row {row} and document {document}, but "
                f"{dataset.dir} has {rows} train rows and {documents} documents"
            )

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self._records)

    @property
    def queries(self) -> np.ndarray:
        """Return the query keys, int64, ascending."""
        return np.asarray(self._records["query"])

    @property
    def scored(self) -> bool:
        """Return whether the file contains teacher scores."""
        return "teacher" in (self._records.dtype.names or ())

    @property
    def positioned(self) -> bool:
        """Return whether the file contains the positions where documents were shown."""
        return "shown" in (self._records.dtype.names or ())

    @property
    def width(self) -> int:
        """Return W."""
        return int(self._records["window"].shape[1])

    def windows(self, queries: np.ndarray) -> np.ndarray:
        """Return the windows int32 [m, W] of int64 keys [m]. Raises DataError: a query is missing."""
        return np.asarray(self._records["window"][self._record_indices(queries)])

    def teacher_scores(self, queries: np.ndarray) -> np.ndarray:
        """Return float32 [m, 1 + W]: teacher scores of the target and of the window, NaN if absent.

        Requires `scored`. Raises DataError: a query is missing.
        """
        return np.asarray(self._records["teacher"][self._record_indices(queries)])

    def _record_indices(self, queries: np.ndarray) -> np.ndarray:
        indices, present = find_sorted(self.queries, queries)
        if not present.all():
            row, event = divmod(int(queries[~present][0]), 1 << EVENT_BITS)
            raise DataError(
                f"{self._path} has no negatives for row {row} (event {event}) and {(~present).sum() - 1} other queries "
                "of a batch; mine again"
            )
        return indices

    def sample(
        self, rows: Rows, epoch: int, seed: int, k: int, teacher_margin: float | None = None
    ) -> SampledNegatives:
        """Sample k documents per query from its window; see `sample_positions`.

        teacher_margin: documents with a teacher score above the target's minus this margin are never sampled.
        """
        window = self.windows(rows.query_keys)
        teacher = self.teacher_scores(rows.query_keys) if self.scored else None
        if teacher is not None and teacher_margin is not None:
            window = np.where(teacher[:, 1:] > teacher[:, :1] - teacher_margin, -1, window)
        positions = sample_positions(window, rows, epoch, seed, k)
        documents = take_positions(window, positions, -1).astype(np.int64)
        shown = None
        if self.positioned:
            every = self._records["shown"][self._record_indices(rows.query_keys)].astype(np.int64)
            shown = np.concatenate([every[:, :1], take_positions(every[:, 1:], positions, 0).astype(np.int64)], 1)
        if teacher is None:
            return SampledNegatives(documents, None, shown)
        sampled = take_positions(teacher[:, 1:], positions, np.nan)
        return SampledNegatives(documents, np.concatenate([teacher[:, :1], sampled], 1).astype(np.float32), shown)

    def per_query(self) -> float:
        """Return the mean number of negatives per query."""
        return float((self._records["window"] >= 0).sum(axis=1).mean()) if len(self) else 0.0


class UniformNegatives:
    """Documents sampled uniformly from those that may be negatives of a query, in place of hard negatives."""

    def __init__(self, documents: NegativeDocuments) -> None:
        self._documents = documents

    def sample(self, rows: Rows, epoch: int, seed: int, k: int, times: np.ndarray | None = None) -> SampledNegatives:
        """Sample k documents per query, as deterministic as `sample_positions`; repeated draws become -1.

        times: of the queries, float64 [m]; None: unknown.
        """
        keys = mix64(_query_ids(rows), derive_key(seed, epoch))
        random = mix64(keys[:, None] ^ mix64(np.arange(k), 0), 0)
        drawn = np.sort(self._documents.draw(random, np.full(len(keys), np.nan) if times is None else times), axis=1)
        drawn[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = -1
        return SampledNegatives(drawn)


def sample_positions(window: np.ndarray, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
    """Sample positions int64 [m, k] of distinct entries of each `window` [m, W], padded with -1.

    A pure function of (seed, epoch, row id) and, in a row of several queries, of the event: independent of ranks and
    steps, different in every epoch.
    """
    query_keys = mix64(_query_ids(rows), derive_key(seed, epoch))
    keys = mix64(query_keys[:, None] ^ mix64(np.arange(window.shape[1]), 0), 0)
    keys = np.where(window < 0, np.iinfo(np.uint64).max, keys)
    positions = np.argsort(keys, axis=1, kind="stable")[:, :k]
    positions = np.where(np.take_along_axis(window, positions, axis=1) < 0, -1, positions)
    return np.pad(positions, ((0, 0), (0, k - positions.shape[1])), constant_values=-1)


def sample_window(window: np.ndarray, rows: Rows, epoch: int, seed: int, k: int) -> np.ndarray:
    """Sample int32 [m, k] entries of each `window` [m, W], see `sample_positions`; padded with -1."""
    return take_positions(window, sample_positions(window, rows, epoch, seed, k), -1).astype(np.int32)


def take_positions(values: np.ndarray, positions: np.ndarray, absent: float) -> np.ndarray:
    """Return `values` [m, W] at `positions` [m, k], `absent` for a position of -1."""
    return np.where(positions < 0, absent, np.take_along_axis(values, np.maximum(positions, 0), axis=1))


def _query_ids(rows: Rows) -> np.ndarray:
    """Return a step-independent id per query, int64 [m]."""
    return rows.row_ids if rows.row is None else rows.query_keys


@dataclass(frozen=True)
class ReviewedNegative:
    """The texts of a query, its document and a sampled negative, for review."""

    row_id: int
    query: str
    document: str
    negative: str


def sample_negatives(dataset: Dataset, hard: HardNegatives, count: int, seed: int = 0) -> list[ReviewedNegative]:
    """Return one negative each of `count` evenly spaced queries, as sampled for `seed`.

    Texts are formatted as the towers read them: truncated, in the tokenizer's case. Raises: ConfigError: a side has no
    text; DataError: `hard` is of another dataset.
    """
    texts = Texts.of(dataset)
    num_rows, queries = dataset.num_rows("train"), hard.queries
    last = queries[-1] >> EVENT_BITS if len(queries) else -1
    if last >= num_rows:
        raise DataError(f"negatives were mined for row {last}, but {dataset.dir} has {num_rows} train rows")
    selected = queries[np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(np.int64)]
    examples = []
    for rows in rows_of_queries(dataset, selected, ROWS_AT_ONCE):
        negative = sample_window(hard.windows(rows.query_keys), rows, 0, seed, 1)[:, 0].astype(np.int64)
        target, other = (texts.documents(docs) for docs in (rows.doc_rows.astype(np.int64), np.maximum(negative, 0)))
        columns = (rows.row_ids.tolist(), texts.queries(rows.query), target, other, negative.tolist())
        examples += [ReviewedNegative(*values) for *values, row in zip(*columns, strict=True) if row >= 0]
    return examples
