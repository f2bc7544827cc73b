"""Full-catalogue evaluation of a split, on one rank or distributed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DivergedError
from bigdssm.evaluation.metrics import mean_metrics
from bigdssm.evaluation.ranks import (
    inner_product_scoring,
    pair_scoring,
    ranks_of_round,
    ranks_of_scores,
)
from bigdssm.evaluation.reranking import RERANKED_AT_ONCE, Reranking, ScoredEncoders
from bigdssm.loader.batch import as_tensor
from bigdssm.retrieval.embed import DocumentVectors, Encoders, Share, all_finite, encode_catalogue, encode_queries
from bigdssm.retrieval.exact_search import QUERIES_AT_ONCE, excluded_documents, rounds
from bigdssm.utils.log import Progress, no_progress

SCORES_PER_CHUNK = 16_777_216  # of `evaluate_scores`, 128 MiB of float64


@dataclass(frozen=True)
class Evaluation:
    """Ranks of the target documents, and their metrics."""

    ranks: np.ndarray  # float64 [usable rows of the split], in dataset order; NaN if the relevance is 0
    query_ids: np.ndarray  # int64 [usable rows]
    metrics: dict[str, float]
    seconds: float


def evaluate_split(
    encoders: Encoders,
    dataset: Dataset,
    split: str,
    *,
    documents: DocumentVectors | None = None,
    rank: int = 0,
    world_size: int = 1,
    rows_per_chunk: int = 1024,
    exclude_seen: bool | str = True,
    rerank: Reranking | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluate a two-tower model on `split` against all documents; the same result on every rank.

    All ranks must call it: documents and queries are sharded over ranks and encoded in chunks of `rows_per_chunk`.
    `documents` is the rank's share of the document vectors, if already encoded; ignored with an MLP scorer, which needs
    other vectors. `rerank` re-ranks the best documents per query. Raises: DataError: no such split; DivergedError, on
    every rank: a vector is not finite (comparisons with NaN would rank every target first).
    """
    started = time.perf_counter()
    dataset.index(split)
    share = Share(rank, world_size, rows_per_chunk, progress)
    scoring = inner_product_scoring()
    if isinstance(encoders, ScoredEncoders):
        scoring, documents = pair_scoring(encoders.scorer), None
    if documents is None:
        documents = encode_catalogue(encoders, dataset.catalogue, share)
    error = DivergedError(f"vectors of split {split} hold NaN or inf")
    distributed.raise_together(None if all_finite(documents.vectors) else error)
    ranks, query_ids = [np.zeros(0)], [np.zeros(0, np.int64)]
    excluded = excluded_documents(dataset, exclude_seen)
    at_once = QUERIES_AT_ONCE if rerank is None else RERANKED_AT_ONCE
    for batch in rounds(encode_queries(encoders, dataset, split, share), documents, excluded, at_once):
        if not all_finite(batch.vectors):  # replicated: all ranks raise
            raise error
        batch_ranks = ranks_of_round(scoring, batch, documents)
        if rerank is not None:
            batch_ranks = rerank.ranks(batch_ranks, batch, documents)
        ranks.append(_of_relevant(batch_ranks, batch.rows))
        query_ids.append(batch.rows.query_ids)
    everything = distributed.all_gather_object((np.concatenate(ranks), np.concatenate(query_ids)))
    return _evaluation([of_rank[0] for of_rank in everything], [of_rank[1] for of_rank in everything], started)


def evaluate_scores(
    scores: Callable[[Rows], np.ndarray],
    dataset: Dataset,
    split: str,
    *,
    exclude_seen: bool | str = True,
) -> Evaluation:
    """Evaluate a function from Rows of m queries to float scores [m, N], on one rank.

    Raises DataError: no such split.
    """
    started = time.perf_counter()
    dataset.index(split)
    rows_per_chunk = max(1, min(1024, SCORES_PER_CHUNK // dataset.catalogue.num_docs))
    ranks, query_ids = [np.zeros(0)], [np.zeros(0, np.int64)]
    for rows in dataset.iterate(split, rows_per_chunk):
        queries, docs = excluded_documents(dataset, exclude_seen)(rows)
        table, target, excluded = map(as_tensor, (scores(rows), rows.doc_rows, docs.astype(np.int64)))
        rank = ranks_of_scores(table, target, (as_tensor(queries), excluded), as_tensor(dataset.catalogue.withdrawn))
        ranks.append(_of_relevant(rank, rows))
        query_ids.append(rows.query_ids)
    return _evaluation(ranks, query_ids, started)


def _evaluation(ranks: Sequence[np.ndarray], query_ids: Sequence[np.ndarray], started: float) -> Evaluation:
    everything = np.concatenate(ranks)
    seconds = time.perf_counter() - started
    return Evaluation(everything, np.concatenate(query_ids), mean_metrics(everything), seconds)


def _of_relevant(ranks: Tensor, rows: Rows) -> np.ndarray:
    return np.where(rows.relevance > 0, ranks.cpu().numpy(), np.nan)
