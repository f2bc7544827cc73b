"""Hard-negative mining: a window of ranks of the documents that training queries retrieve.

Ranks below `first` are skipped because they contain false negatives: relevant documents without an interaction. For the
same reason `margin` drops documents that score close to the target. Only train positives are excluded: excluding
validation or test items would leak them.

Shapes: m rows, N documents, W = last − first window positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.keys import find_sorted
from bigdssm.dataset.rows import Rows
from bigdssm.errors import BigDSSMError, ConfigError, DivergedError
from bigdssm.features.ragged import gather_ranges
from bigdssm.retrieval.embed import (
    DocumentVectors,
    Encoders,
    Share,
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
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import put_file, real_path, temporary_path
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

PASS_ROWS = 65_536
SAMPLE = 512  # queries over all ranks for the recall of an approximate index
RESULTS_AT_ONCE = 4_194_304  # per round, over all ranks: 32 MiB


@dataclass(frozen=True)
class TrainPositives:
    """Train positives by query id."""

    query_ids: np.ndarray  # int64, sorted, distinct
    starts: np.ndarray  # int64 [len(query_ids) + 1]
    doc_rows: np.ndarray  # int64

    @classmethod
    def of(cls, dataset: Dataset, share: Share | None = None, exclude_seen: bool | str = True) -> "TrainPositives":
        """Collect the positives of this rank's share of the train split; with a condition those that match it."""
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        share = replace(share or Share(), rows_per_chunk=PASS_ROWS)
        for rows in iterate_share(dataset, "train", share, "known positives read"):
            if rows is not None:
                is_known = rows.relevance > 0
                if isinstance(exclude_seen, str):
                    is_known &= dataset.matching_targets(rows, exclude_seen, "data.exclude_seen")
                queries, docs = rows.query_ids[is_known], rows.doc_rows[is_known]
                parts.append((queries, docs))
                if dataset.schema.siamese:  # pairs are symmetric
                    query_docs = dataset.catalogue.rows_by_id(queries)
                    parts.append((dataset.catalogue.ids(docs[query_docs >= 0]), query_docs[query_docs >= 0]))
        ids, docs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((docs, ids))
        query_ids, starts = np.unique(ids[order], return_index=True)
        return cls(query_ids, np.append(starts, len(order)), docs[order])

    def pairs(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (row, catalogue row), int64, of every known positive of the queries `query_ids` [m]."""
        position, present = find_sorted(self.query_ids, query_ids)
        following = np.minimum(position + 1, len(self.starts) - 1)  # without positives, `starts` has one entry
        first = np.where(present, self.starts[position], 0)
        end = np.where(present, self.starts[following], 0)
        docs = gather_ranges(self.doc_rows, first, end)
        return np.repeat(np.arange(len(query_ids)), end - first), docs.values


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
    share: Share | None = None,
    exclude_seen: bool | str = True,
) -> np.ndarray:
    """Mine this rank's `window_records`: documents at ranks [first, last) per training query.

    `rows` are the queries to mine for, in as many chunks on every rank; default: the rank's share of the split. Known
    positives (the target, and with `exclude_seen` the query's train documents and its history, or the query itself if
    it is a document) are removed before ranking. Windows are padded with -1 behind the last document and, with
    `margin`, for documents that score above the target's score minus the margin. In a catalogue of more than
    `exact_up_to` documents each rank searches an approximate index of its share, and the log reports its recall.
    `documents` are the rank's share of the catalogue's index vectors, if already encoded. All ranks must call it.
    Raises: ConfigError: no document has a rank of at least `first`; DivergedError: a vector is not finite.
    """
    num_docs, num_candidates = dataset.catalogue.num_docs, dataset.catalogue.num_candidates
    if first >= num_candidates:
        raise ConfigError(
            f"hard negatives from first={first}: the ranks of {num_candidates} documents are 0 to "
            f"{num_candidates - 1}; choose a lower one"
        )
    share = share or Share()
    if documents is None:
        documents = encode_catalogue(encoders, dataset.catalogue, share)
    error = DivergedError("the model's vectors hold NaN or inf; nothing mined")
    distributed.raise_together(None if all_finite(documents.vectors) else error)
    last = min(last, num_docs)
    excluded = excluded_documents(dataset, exclude_seen)
    known_positives = TrainPositives.of(dataset, share, exclude_seen).pairs if exclude_seen else None
    approximate = exact_up_to is not None and num_docs > exact_up_to
    search = approximate_search(documents, num_docs, share) if approximate else exact_search(documents)
    keys = [np.zeros(0, np.int64)]
    windows = [np.zeros((0, last - first), np.int32)]
    chunks = encode_queries(encoders, dataset, "train", share, rows)
    at_once = min(QUERIES_AT_ONCE, RESULTS_AT_ONCE // last)
    for number, batch in enumerate(rounds(chunks, documents, excluded, at_once, known_positives)):
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
