"""Full-catalogue evaluation of a split, on one rank or distributed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
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
from bigdssm.retrieval.exact_search import (
    QUERIES_AT_ONCE,
    TOP_QUERIES_AT_ONCE,
    exact_search,
    excluded_documents,
    rounds,
    top_of_round,
    unpack_keys,
)
from bigdssm.utils.log import Progress, no_progress

TOP = 10  # answers of a query that count for the coverage
SCORES_PER_CHUNK = 16_777_216  # of `evaluate_scores`, 128 MiB of float64


@dataclass(frozen=True)
class Evaluation:
    """Ranks of the target documents, and their metrics."""

    ranks: np.ndarray  # float64 [usable rows of the split], in dataset order; NaN if the relevance is 0
    query_ids: np.ndarray  # int64 [usable rows]
    metrics: dict[str, float]
    seconds: float
    coverage: float | None = None  # share of the candidates among the first TOP answers of any query, if computed


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
    coverage: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluate a two-tower model on `split` against all documents; the same result on every rank.

    If items have times, a query ranks those that are available at its time (`Dataset.item_times`).

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
    times = None
    if dataset.header.dated:
        times, since = dataset.request_times, dataset.item_times[documents.first : documents.first + len(documents)]
        documents = replace(documents, since=torch.from_numpy(since).to(documents.vectors.device))
    ranks, query_ids, answers = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    excluded = excluded_documents(dataset, exclude_seen)
    at_once = QUERIES_AT_ONCE if rerank is None else RERANKED_AT_ONCE
    queries = encode_queries(encoders, dataset, split, share)
    for batch in rounds(queries, documents, excluded, at_once, times=times):
        if not all_finite(batch.vectors):  # replicated: all ranks raise
            raise error
        batch_ranks = ranks_of_round(scoring, batch, documents)
        if coverage and rerank is None:
            search = exact_search(documents, scoring.matrix, scoring.scores_at_once // TOP_QUERIES_AT_ONCE)
            answers.append(_answers(batch_ranks, batch.rows, unpack_keys(top_of_round(search, batch, TOP))[1]))
        if rerank is not None:
            batch_ranks = rerank.ranks(batch_ranks, batch, documents)
        ranks.append(_of_relevant(batch_ranks, batch.rows))
        query_ids.append(batch.rows.query_ids)
    parts = distributed.all_gather_object([np.concatenate(part) for part in (ranks, query_ids, answers)])
    all_ranks, all_ids, all_answers = (np.concatenate(part) for part in zip(*parts, strict=True))
    covered = _coverage(dataset, all_answers) if coverage and rerank is None else None
    return Evaluation(all_ranks, all_ids, mean_metrics(all_ranks), time.perf_counter() - started, covered)


def evaluate_scores(
    scores: Callable[[Rows], np.ndarray],
    dataset: Dataset,
    split: str,
    *,
    exclude_seen: bool | str = True,
    coverage: bool = False,
) -> Evaluation:
    """Evaluate a function from Rows of m queries to float scores [m, N], on one rank.

    The candidates are those of `evaluate_split`. Raises DataError: no such split.
    """
    started = time.perf_counter()
    dataset.index(split)
    rows_per_chunk = max(1, min(1024, SCORES_PER_CHUNK // dataset.catalogue.num_docs))
    ranks, query_ids, answers = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    withdrawn = np.zeros(dataset.catalogue.num_docs, bool)
    withdrawn[dataset.catalogue.withdrawn] = True
    for rows in dataset.iterate(split, rows_per_chunk):
        queries, docs = excluded_documents(dataset, exclude_seen)(rows)
        table, target, excluded = map(as_tensor, (scores(rows), rows.doc_rows, docs.astype(np.int64)))
        unavailable = withdrawn
        if dataset.header.dated:
            unavailable = withdrawn | (dataset.item_times > dataset.request_times(rows)[:, None])
        rank, others = ranks_of_scores(
            table, target, (as_tensor(queries), excluded), as_tensor(unavailable), TOP if coverage else 0
        )
        if coverage:
            answers.append(_answers(rank, rows, others))
        ranks.append(_of_relevant(rank, rows))
        query_ids.append(rows.query_ids)
    all_ranks, all_ids = np.concatenate(ranks), np.concatenate(query_ids)
    covered = _coverage(dataset, np.concatenate(answers)) if coverage else None
    return Evaluation(all_ranks, all_ids, mean_metrics(all_ranks), time.perf_counter() - started, covered)


def _answers(ranks: Tensor, rows: Rows, others: Tensor) -> np.ndarray:
    """Return the distinct documents among the first TOP answers, int64; `others` are the answers but the targets."""
    answers, first = others.cpu().numpy().copy(), ranks.cpu().numpy() <= TOP
    answers = np.concatenate([np.where(first, rows.doc_rows, answers[:, -1])[:, None], answers[:, :-1]], axis=1)
    distinct: np.ndarray = np.unique(answers[answers >= 0])
    return distinct


def _coverage(dataset: Dataset, answers: np.ndarray) -> float:
    return len(np.unique(answers)) / dataset.catalogue.num_candidates


def _of_relevant(ranks: Tensor, rows: Rows) -> np.ndarray:
    return np.where(rows.relevance > 0, ranks.cpu().numpy(), np.nan)
