"""Mining hard negatives: for train queries, a range of ranks (a window) of what they retrieve.

Ranks below `first` are left out because they hold what the user would have liked but did not happen to meet, and so
may be documents that score nearly as the query's own does (`margin`). Only train rows are looked at: leaving out
validation or test items would tell the model what they are.

Shapes: m rows, N documents, W = last − first window places.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import BigDSSMError, DivergedError
from bigdssm.retrieval.embed import (
    DocumentVectors,
    Encoders,
    Share,
    all_finite,
    encode_catalogue,
    encode_queries,
    pieces_of,
)
from bigdssm.retrieval.exact_search import (
    QUERIES_AT_ONCE,
    Search,
    SearchRound,
    approximate_search,
    exact_search,
    excluded_documents,
    opened,
    rounds,
    top_of_round,
)
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import put_file, real_path, temporary_path
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

PASS_ROWS = 65_536
SAMPLE = 512  # queries of all ranks that an approximate index is checked with
FOUND_AT_ONCE = 4_194_304  # of all ranks' queries in a round, 32 MiB


@dataclass(frozen=True)
class TrainPositives:
    """Train positives of queries, by query id."""

    query_ids: np.ndarray  # int64, sorted, distinct
    starts: np.ndarray  # int64 [len(query_ids) + 1]
    doc_rows: np.ndarray  # int64

    @classmethod
    def of(cls, dataset: Dataset, share: Share | None = None) -> TrainPositives:
        """Return those that this rank's share of the train split tells of; with those of all ranks they are all."""
        parts = []
        share = replace(share or Share(), rows_per_chunk=PASS_ROWS)
        for rows in pieces_of(dataset, "train", share, "known positives read"):
            if rows is not None:
                queries, docs = rows.query_ids[rows.relevance > 0], rows.doc_rows[rows.relevance > 0]
                parts.append((queries, docs))
                if dataset.schema.siamese:  # pairs hold in both directions
                    own = dataset.catalogue.rows_of(queries)
                    parts.append((dataset.catalogue.ids(docs[own >= 0]), own[own >= 0]))
        ids, docs = (np.concatenate([part[side] for part in parts] or [np.zeros(0, np.int64)]) for side in (0, 1))
        order = np.lexsort((docs, ids))
        query_ids, starts = np.unique(ids[order], return_index=True)
        return cls(query_ids, np.append(starts, len(order)), docs[order])

    def pairs(self, query_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (row, catalogue row) of every known positive of the queries `query_ids` [m], int64."""
        place = np.minimum(np.searchsorted(self.query_ids, query_ids), max(len(self.query_ids) - 1, 0))
        known = self.query_ids[place] == query_ids if len(self.query_ids) else np.zeros(len(query_ids), bool)
        first = np.where(known, self.starts[place], 0)
        length = np.where(known, self.starts[np.minimum(place + 1, len(self.starts) - 1)], 0) - first
        entry = np.repeat(first - np.cumsum(length) + length, length) + np.arange(length.sum())
        return np.repeat(np.arange(len(query_ids)), length), self.doc_rows[entry]


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
    exclude_seen: bool = True,
) -> np.ndarray:
    """Return this rank's `window_records`: the catalogue rows at ranks [first, last) of each train query's ranking.

    `rows` are those to mine for, in as many pieces on every rank; by default the rank's share of the split. Known
    positives (its target, and with `exclude_seen` all of the query's train documents and its own history, or the
    document that it is) are taken out before ranks are counted, and windows end with the catalogue; -1 stands where a
    ranking ends, and with `margin` where a document's score alpha * <u, w> + beta is above that of its own less the
    margin. In a catalogue of more than `exact_up_to` documents each rank asks an approximate index of its share, and
    the log tells how much that finds of what scoring all would. `documents` are the rank's share of the catalogue's
    index vectors where they were made before. A collective over the ranks. Raises DivergedError where a vector is not
    finite.
    """
    share = share or Share()
    if documents is None:
        documents = encode_catalogue(encoders, dataset.catalogue.num_docs, share)
    error = DivergedError("the model's vectors hold NaN or inf; nothing mined")
    distributed.raise_together(None if all_finite(documents.vectors) else error)
    last = min(last, max(dataset.catalogue.num_docs, first + 1))  # behind it there is nothing
    left_out = excluded_documents(dataset, exclude_seen)
    known = TrainPositives.of(dataset, share).pairs if exclude_seen else None
    num_docs = dataset.catalogue.num_docs
    approximate = exact_up_to is not None and num_docs > exact_up_to
    search = approximate_search(documents, num_docs, share) if approximate else exact_search(documents)
    keys, windows = [np.zeros(0, np.int64)], [np.zeros((0, last - first), np.int32)]
    pieces = encode_queries(encoders, dataset, "train", share, rows)
    asked_at_once = min(QUERIES_AT_ONCE, FOUND_AT_ONCE // last)
    for number, asked in enumerate(rounds(pieces, documents, left_out, asked_at_once, known)):
        if not all_finite(asked.vectors):  # which all ranks see alike
            raise error
        if approximate and number == 0:
            _log_recall(documents, search, asked.head(max(1, SAMPLE // distributed.world_size())), last)
        scores, best = opened(top_of_round(search, asked, last))
        if margin is not None:
            own = asked.own(asked.of_targets(documents, lambda queries, target: (queries * target).sum(dim=1)))
            best = best.masked_fill(scores > (own - margin).unsqueeze(1), -1)
        keys.append(asked.rows.query_keys)
        windows.append(best[:, first:].cpu().numpy().astype(np.int32))
    mined, first_of = np.unique(np.concatenate(keys), return_index=True)
    return window_records(mined, np.concatenate(windows)[first_of])


def gather_mined(path: Path, own: np.ndarray, dataset: Dataset) -> HardNegatives:
    """Return what all ranks mined (`own` of each), mapped from the file `path`; a collective.

    Every rank writes its records, so `path` must be on storage that all ranks see, as a run's folder is; the file
    appears under its name when it is whole.
    """
    path = real_path(path)
    everything = np.unique(np.concatenate(distributed.all_gather_object(own["query"])))
    aside = temporary_path(path)
    full: BigDSSMError | None = None
    if distributed.is_main():
        try:
            new_array(aside, own.dtype, (len(everything),))
        except OSError as error:
            full = BigDSSMError(f"{error.strerror}: {error.filename}")
    distributed.raise_together(full)
    whole = open_memmap(aside, "r+")
    whole[np.searchsorted(everything, own["query"])] = own
    whole.flush()
    distributed.barrier()
    if distributed.is_main():
        seal(aside, dataset.fingerprint)
        put_file(aside, path)
    distributed.barrier()
    return HardNegatives.open(path)


def _log_recall(documents: DocumentVectors, search: Search, asked: SearchRound, top: int) -> None:
    """Tell how many of the best `top` documents a search finds. A collective."""
    exact, found = (opened(top_of_round(one, asked, top))[1] for one in (exact_search(documents), search))
    wanted = exact >= 0
    names = torch.arange(len(exact), device=exact.device)[:, None] << 32
    hit = torch.isin(names + exact, names + found) & wanted
    hits, all_wanted = distributed.all_reduce(torch.stack([hit.sum(), wanted.sum()])).tolist()
    logger.info(
        "mining through an approximate index: it finds %.1f %% of the best %d documents (by %d queries)",
        100 * hits / max(1, all_wanted), top, int(distributed.all_reduce(torch.tensor(len(exact)))),
    )  # fmt: skip
