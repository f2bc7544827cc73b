"""Full-catalogue evaluation of a split, on one rank or on all of them during training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.tensors import as_tensor
from bigdssm.errors import DivergedError
from bigdssm.evaluation.metrics import mean_metrics
from bigdssm.evaluation.ranks import SeenDocuments, by_pairs, by_product, ranks_of_round, ranks_of_scores
from bigdssm.evaluation.reranking import RERANKED_AT_ONCE, Reranking, ScoredEncoders
from bigdssm.features.ragged import offsets_of
from bigdssm.retrieval.embed import DocumentVectors, Encoders, Share, all_finite, encode_catalogue, encode_queries
from bigdssm.retrieval.exact_search import QUERIES_AT_ONCE, Pairs, excluded_documents, rounds
from bigdssm.utils.log import Progress, no_progress

SCORES_PER_CHUNK = 16_777_216  # of a scorer without vectors, 128 MiB of float64


@dataclass(frozen=True)
class Evaluation:
    """The rank of every query's document, and what follows from it."""

    ranks: np.ndarray  # float64 [rows of the split that can be used], in dataset order; NaN where relevance is 0
    query_ids: np.ndarray  # int64, whose each is
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
    exclude_seen: bool = True,
    rerank: Reranking | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Return the Evaluation of a two-tower model on `split`, the same on every rank: every document is scored.

    A collective: documents and queries are shared out over the ranks, `rows_per_chunk` encoded at a time; no rank holds
    other documents than its share. `documents` is this where it was made before; a scorer, which reads other vectors,
    ignores it. With `rerank` its scorer ranks the best documents of each query anew. Raises DataError: no such split;
    DivergedError on every rank where a vector is not finite: comparisons with NaN would rank every target first.
    """
    started = time.perf_counter()
    dataset.index(split)
    share = Share(rank, world_size, rows_per_chunk, progress)
    scoring = by_product()
    if isinstance(encoders, ScoredEncoders):
        scoring, documents = by_pairs(encoders.scorer), None
    if documents is None:
        documents = encode_catalogue(encoders, dataset.catalogue.num_docs, share)
    error = DivergedError(f"vectors of split {split} hold NaN or inf")
    distributed.raise_together(None if all_finite(documents.vectors) else error)
    ranks, query_ids = [np.zeros(0)], [np.zeros(0, np.int64)]
    left_out = excluded_documents(dataset, exclude_seen)
    at_once = QUERIES_AT_ONCE if rerank is None else RERANKED_AT_ONCE
    for asked in rounds(encode_queries(encoders, dataset, split, share), documents, left_out, at_once):
        if not all_finite(asked.vectors):  # which all ranks see alike
            raise error
        found = ranks_of_round(scoring, asked, documents)
        if rerank is not None:
            found = rerank.ranks(found, asked, documents)
        ranks.append(_of_relevant(found, asked.rows))
        query_ids.append(asked.rows.query_ids)
    everything = distributed.all_gather_object((np.concatenate(ranks), np.concatenate(query_ids)))
    return _evaluation([of_rank[0] for of_rank in everything], [of_rank[1] for of_rank in everything], started)


def evaluate_scores(
    scores: Callable[[Rows], np.ndarray],
    dataset: Dataset,
    split: str,
    *,
    exclude_seen: bool = True,
) -> Evaluation:
    """Return the Evaluation of any function from Rows of m queries to float scores [m, N], on one rank.

    Raises DataError: no such split.
    """
    started = time.perf_counter()
    dataset.index(split)
    rows_per_chunk = max(1, min(1024, SCORES_PER_CHUNK // dataset.catalogue.num_docs))
    ranks, query_ids = [np.zeros(0)], [np.zeros(0, np.int64)]
    for rows in dataset.iterate(split, rows_per_chunk):
        left_out = _as_seen(excluded_documents(dataset, exclude_seen)(rows), len(rows))
        rank = ranks_of_scores(as_tensor(scores(rows)), as_tensor(rows.doc_rows), left_out)
        ranks.append(_of_relevant(rank, rows))
        query_ids.append(rows.query_ids)
    return _evaluation(ranks, query_ids, started)


def _evaluation(ranks: Sequence[np.ndarray], query_ids: Sequence[np.ndarray], started: float) -> Evaluation:
    everything = np.concatenate(ranks)
    seconds = time.perf_counter() - started
    return Evaluation(everything, np.concatenate(query_ids), mean_metrics(everything), seconds)


def _as_seen(left_out: Pairs, num_queries: int) -> SeenDocuments:
    queries, docs = left_out
    return SeenDocuments(as_tensor(docs).long(), as_tensor(offsets_of(np.bincount(queries, minlength=num_queries))))


def _of_relevant(ranks: Tensor, rows: Rows) -> np.ndarray:
    return np.where(rows.relevance > 0, ranks.cpu().numpy(), np.nan)
