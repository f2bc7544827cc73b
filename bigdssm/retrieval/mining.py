"""Making hard negatives: mining by ranks that training queries retrieve, or windows from data.

The data are rated documents, or a table of impressions. A query's window then also holds documents of other train rows
with the same query id. The results are files, see hard_negatives.py.

Ranks below `first` are skipped because they contain false negatives: relevant documents without an interaction. For the
same reason `margin` drops documents that score close to the target. Only train positives are excluded: excluding
validation or test items would leak them.

Shapes: m rows or queries, N documents, W (mined: last − first) window positions, p (query, document) pairs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.format import open_memmap

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import find_sorted, pair_hash
from bigdssm.errors import BigDSSMError, ConfigError, DataError, DivergedError
from bigdssm.features.columns import RowCheck, strings, value_lists
from bigdssm.features.ragged import Ragged
from bigdssm.retrieval.embed import (
    DocumentVectors,
    Encoders,
    all_finite,
    encode_catalogue,
    encode_queries,
    iterate_share,
)
from bigdssm.retrieval.exact_search import (
    QUERIES_AT_ONCE,
    approximate_search,
    exact_search,
    excluded_documents,
    rounds,
    top_of_round,
    unpack_keys,
)
from bigdssm.retrieval.hard_negatives import HardNegatives, record_dtype, window_records
from bigdssm.retrieval.shards import WHOLE, Share
from bigdssm.sources.opening import log_row, read_table
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import new_file, put_file, real_path, temporary_path
from bigdssm.utils.hashing import hash_strings, mix64
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

WINDOWS_AT_ONCE = 4096  # rows whose windows are written
PASS_ROWS = 65_536  # read at once for known positives
SAMPLE = 512  # queries over all ranks for the recall of an approximate index
RESULTS_AT_ONCE = 4_194_304  # per round, over all ranks: 32 MiB


@dataclass(frozen=True)
class TrainPositives:
    """Train positives by query id."""

    query_ids: np.ndarray  # int64, sorted, distinct
    documents: Ragged  # int64: catalogue rows per query id

    @classmethod
    def of(cls, dataset: Dataset, share: Share = WHOLE, exclude_seen: bool | str = True) -> "TrainPositives":
        """Collect the positives of this rank's share of the train split; with a condition those that match it."""
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        share = replace(share, rows_per_chunk=PASS_ROWS)
        for rows in iterate_share(dataset, "train", share, "known positives read"):
            if rows is not None:
                is_positive = rows.relevance > 0
                if isinstance(exclude_seen, str):
                    is_positive &= dataset.matching_targets(rows, exclude_seen, "data.exclude_seen")
                queries, docs = rows.query_ids[is_positive], rows.doc_rows[is_positive]
                parts.append((queries, docs))
                if dataset.schema.siamese:  # pairs are symmetric
                    query_docs = dataset.catalogue.rows_by_id(queries)
                    parts.append((dataset.catalogue.ids(docs[query_docs >= 0]), query_docs[query_docs >= 0]))
        ids, docs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((docs, ids))
        query_ids, starts = np.unique(ids[order], return_index=True)
        return cls(query_ids, Ragged(docs[order], np.append(starts, len(order))))

    def pairs(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (row, catalogue row), int64, of every known positive of the queries `query_ids` [m]."""
        position, present = find_sorted(self.query_ids, query_ids)
        docs = self.documents.take(position[present])
        return np.repeat(np.flatnonzero(present), docs.lengths), docs.values


def mine(
    encoders: Encoders,
    dataset: Dataset,
    rows: Iterable[Rows] | None = None,
    *,
    first: int,
    last: int,
    margin: float | None = None,
    exact_up_to: int | None = None,
    documents: DocumentVectors | None = None,
    share: Share = WHOLE,
    exclude_seen: bool | str = True,
    negatives: NegativeDocuments | None = None,
) -> np.ndarray:
    """Mine this rank's `window_records`: documents at ranks [first, last) per training query.

    `rows` are the queries to mine for, in as many chunks on every rank; default: the rank's share of the split. Known
    positives (the target, and with `exclude_seen` the query's train documents and its history, or the query itself if
    it is a document) are removed before ranking. Windows are padded with -1 behind the last document and, with
    `margin`, for documents that score above the target's score minus the margin. In a catalogue of more than
    `exact_up_to` documents, a rank on a CPU searches an approximate index of its share, and the log reports its recall.
    `documents` are the rank's share of the catalogue's index vectors, if already encoded. `negatives` are the documents
    that may be mined, each for the queries from its time on; by default those of a model without id_dropout. All ranks
    must call it. Raises: ConfigError: no document has a rank of `first` or more; DivergedError: a vector is not finite.
    """
    negatives = NegativeDocuments.of(dataset, id_dropout=0.0) if negatives is None else negatives
    num_docs, num_candidates = negatives.num_docs, negatives.num_docs - len(negatives.undrawn)
    if first >= num_candidates:
        raise ConfigError(
            f"hard negatives from first={first}: the ranks of {num_candidates} documents are 0 to "
            f"{num_candidates - 1}; choose a lower one"
        )
    if documents is None:
        documents = encode_catalogue(encoders, dataset.catalogue, share)
    error = DivergedError("the model's vectors hold NaN or inf; nothing mined")
    distributed.raise_together(None if all_finite(documents.vectors) else error)
    documents = replace(documents, withdrawn=negatives.undrawn)
    times = None
    if negatives.since is not None:
        times = dataset.request_times
        since = torch.from_numpy(negatives.since[documents.first : documents.first + len(documents)])
        documents = replace(documents, since=since.to(documents.vectors.device))
    last = min(last, num_docs)
    excluded = excluded_documents(dataset, exclude_seen)
    known_positives = TrainPositives.of(dataset, share, exclude_seen).pairs if exclude_seen else None
    on_host = documents.vectors.device.type == "cpu"  # a device searches all of its share, by products in tiles
    approximate = on_host and exact_up_to is not None and num_docs > exact_up_to
    search = approximate_search(documents, num_docs, share) if approximate else exact_search(documents)
    keys = [np.zeros(0, np.int64)]
    windows = [np.zeros((0, last - first), np.int32)]
    chunks = encode_queries(encoders, dataset, "train", share, rows)
    at_once = min(QUERIES_AT_ONCE, RESULTS_AT_ONCE // last)
    for number, batch in enumerate(rounds(chunks, documents, excluded, at_once, known_positives, times)):
        if not all_finite(batch.vectors):  # replicated: all ranks raise
            raise error
        if approximate and number == 0:
            sample = batch.head(max(1, SAMPLE // distributed.world_size()))
            _, exact = unpack_keys(top_of_round(exact_search(documents), sample, last))
            _, approximated = unpack_keys(top_of_round(search, sample, last))
            relevant = exact >= 0
            query = torch.arange(len(exact), device=exact.device)[:, None] << 32  # query + document: one key per pair
            hit = torch.isin(query + exact, query + approximated) & relevant
            hits, total = distributed.all_reduce(torch.stack([hit.sum(), relevant.sum()])).tolist()
            logger.info(
                "mining with an approximate index: recall %.1f %% of the best %d documents (%d queries)",
                100 * hits / max(1, total), last, int(distributed.all_reduce(torch.tensor(len(exact)))),
            )  # fmt: skip
        scores, best = unpack_keys(top_of_round(search, batch, last))
        if margin is not None:
            target = batch.local(batch.of_targets(documents, lambda queries, target: (queries * target).sum(dim=1)))
            best = best.masked_fill(scores > (target - margin).unsqueeze(1), -1)
        keys.append(batch.rows.query_keys)
        windows.append(best[:, first:].cpu().numpy().astype(np.int32))
    queries, index = np.unique(np.concatenate(keys), return_index=True)  # sorted, as records are
    return window_records(queries, np.concatenate(windows)[index])


def gather_hard_negatives(path: Path, local: np.ndarray, dataset: Dataset) -> HardNegatives:
    """Merge the records of all ranks (`local` per rank) into the file `path` and memory-map it.

    All ranks must call it. Every rank writes its records, so `path` must be on shared storage, such as the run folder.
    The file appears under its name when complete.
    """
    path = real_path(path)
    queries = np.unique(np.concatenate(distributed.all_gather_object(local["query"])))
    temporary = temporary_path(path)
    failure: BigDSSMError | None = None
    if distributed.is_main():
        try:
            new_array(temporary, local.dtype, (len(queries),))
        except OSError as error:
            failure = BigDSSMError(f"{error.strerror}: {error.filename}")
    distributed.raise_together(failure)
    records = open_memmap(temporary, "r+")
    records[np.searchsorted(queries, local["query"])] = local
    records.flush()
    distributed.barrier()
    if distributed.is_main():
        seal(temporary, dataset.rows_fingerprint)
        put_file(temporary, path)
    distributed.barrier()
    return HardNegatives.open(path)


class CandidateRows:
    """Distinct candidate documents grouped by query, in window order."""

    def __init__(
        self, queries: np.ndarray, docs: np.ndarray, relevance: np.ndarray | None, low: float = 0.0,
        shown: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Sort and deduplicate pairs: relevance of at most `low` first, else in pseudo-random order.

        Shapes: [p]. A repeated pair keeps its greatest relevance, and its first position in `shown`.
        """
        grade = np.zeros(len(queries), np.float32) if relevance is None else relevance
        # The first entry of each pair has its greatest relevance; the slice is for no pairs at all.
        initial = np.lexsort((-grade, docs, queries))
        first = np.append(True, (np.diff(queries[initial]) != 0) | (np.diff(docs[initial]) != 0))[: len(queries)]
        pairs = initial[first]
        key = mix64(queries[pairs], 0) ^ mix64(docs[pairs], 0)
        pairs = pairs[np.lexsort((key, grade[pairs] > low, queries[pairs]))]
        self.queries, self.docs = queries[pairs], docs[pairs]  # hashed keys, ascending, and catalogue rows
        self.relevance = None if relevance is None else grade[pairs]
        self.shown = None if shown is None else shown[pairs]

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
        # query << 32 | document: one key per pair
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


def write_rated(path: Path, dataset: Dataset, width: int, low: float, share: Share = WHOLE) -> HardNegatives:
    """Write windows of the train ratings per query id, with relevances as teacher scores.

    Ratings of at most `low` (explicit negatives) come first. Raises DataError: all windows are empty.
    """
    pieces = iterate_share(dataset, "train", share, "ratings read")
    columns = [(rows.query_ids, rows.doc_rows, rows.relevance) for rows in pieces if rows is not None]
    query_ids, docs, relevance = (np.concatenate(column) for column in zip(*columns, strict=True))
    rated = CandidateRows(query_ids, docs, relevance, low)

    def windows_of(rows: Rows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        targets = np.arange(rows.num_queries), rows.doc_rows
        windows, grades, _ = rated.windows(rows.query_ids, targets, width)
        return windows, {"teacher": np.concatenate([rows.relevance[:, None], grades], 1)}

    empty = f"{dataset.dir}: no training query has a rated document other than its target, so there are no candidates"
    return _write(path, dataset, windows_of, record_dtype(width, scored=True), empty=empty, share=share)


def write_candidates(
    path: Path, dataset: Dataset, table: Path, columns: tuple[str, str | None, str, str | None], width: int,
    share: Share = WHOLE,
) -> HardNegatives:  # fmt: skip
    """Write windows of the candidates that a table lists per query, such as impressions without a click.

    columns: the query's key, its target's key (None: a table row applies to all rows of its query), the candidates'
    keys, and the positions where the target and the candidates were shown (None: not stored). Documents outside the
    dataset and train positives of the query id are excluded. Raises DataError: all windows are empty, or a list of
    positions is invalid.
    """
    positives = TrainPositives.of(dataset, share)
    query_column, target_column, candidate_column, position_column = columns
    nothing = np.zeros(0, np.int64)
    queries, docs, positions = [nothing], [nothing], [nothing]  # of candidates
    targets, target_positions = [nothing], [nothing]  # of table rows, with a position column
    missing = 0
    options = dict(zip(columns, ("--query-column", "--positive-column", "--column", "--position-column"), strict=True))
    for batch in read_table(table, {column: option for column, option in options.items() if column}, log_row):
        check = RowCheck(batch, log_row)
        hashed, lists = hash_strings(strings(check, query_column)), value_lists(check, candidate_column, " ")
        if target_column is not None:
            hashed = pair_hash(hashed, dataset.catalogue.rows_by_key(strings(check, target_column).to_pylist()))
        rows = dataset.catalogue.rows_by_key(lists.flatten().to_pylist())
        queries.append(np.repeat(hashed, np.diff(np.asarray(lists.offsets)))[rows >= 0])
        docs.append(rows[rows >= 0])
        if position_column is not None:
            own, displayed = _display_positions(table, check, position_column, lists)
            targets.append(hashed)
            target_positions.append(own)
            positions.append(displayed[rows >= 0])
        missing += int((rows < 0).sum())
    if missing:
        logger.warning(
            "%s: %d entries of column %s are no document of %s", table, missing, candidate_column, dataset.dir
        )
    shown = None if position_column is None else np.concatenate(positions)
    candidates = CandidateRows(np.concatenate(queries), np.concatenate(docs), None, shown=shown)
    target_keys, first = np.unique(np.concatenate(targets), return_index=True)
    position_of_key = np.concatenate(target_positions)[first]  # of a repeated key the first

    def windows_of(rows: Rows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        queries = rows.query_ids if target_column is None else pair_hash(rows.query_ids, rows.doc_rows)
        number, docs = positives.pairs(rows.query_ids)
        excluded = np.append(number, np.arange(rows.num_queries)), np.append(docs, rows.doc_rows)
        windows, _, window_positions = candidates.windows(queries, excluded, width)
        if position_column is None:
            return windows, {}
        index, present = find_sorted(target_keys, queries)
        own = np.where(present, position_of_key[index], 0)
        return windows, {"shown": np.concatenate([own[:, None], window_positions], 1)}

    empty = f"{table}: no training query of {dataset.dir} has a candidate in it; check the ids in its columns"
    record = record_dtype(width, shown=position_column is not None)
    return _write(path, dataset, windows_of, record, empty=empty, share=share)


def _write(
    path: Path, dataset: Dataset, windows_of: Callable[[Rows], tuple[np.ndarray, dict[str, np.ndarray]]],
    record: np.dtype[np.void], *, empty: str, share: Share,
) -> HardNegatives:  # fmt: skip
    """Write `windows_of`(train rows): windows [m, W], and further fields of `record`.

    Raises DataError with the message `empty`: all windows are empty.
    """
    path, position, all_empty = real_path(path), 0, True
    with new_file(path) as temporary:
        records_of_file = new_array(temporary, record, (dataset.num_queries("train"),))
        for first in range(0, dataset.num_rows("train"), WINDOWS_AT_ONCE):
            last = min(first + WINDOWS_AT_ONCE, dataset.num_rows("train"))
            for rows in dataset.iterate_range("train", first, last, dataset.rows_for_queries("train", WINDOWS_AT_ONCE)):
                records = records_of_file[position : position + rows.num_queries]
                records["query"] = rows.query_keys
                records["window"], further = windows_of(rows)
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


def _display_positions(table: Path, check: RowCheck, column: str, lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
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
