"""Full-catalogue evaluation of a split, on one rank or distributed: exact ranks, re-ranking, metrics.

rank = 1 + documents that score higher + half of those that tie. Seen documents are excluded, the target never is.
Shapes: m queries, N documents, D+1 the width of index vectors.
"""

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
from bigdssm.loader.batch import as_tensor
from bigdssm.retrieval.embed import (
    DocumentVectors,
    Encoders,
    all_finite,
    encode_catalogue,
    encode_queries,
)
from bigdssm.retrieval.exact_search import (
    LEAST_ROWS,
    QUERIES_AT_ONCE,
    ExcludedDocuments,
    SearchRound,
    exact_search,
    excluded_documents,
    inner_products,
    rounds,
    top_of_round,
    unpack_keys,
)
from bigdssm.retrieval.reranking import Reranker
from bigdssm.retrieval.shards import Share
from bigdssm.utils.log import Progress, no_progress

QUERIES_PER_TILE = 512
SCORES_PER_TILE = 8_388_608  # 32 MiB of float32
# Vectors depend on the batch size in their last bits, so scores within rounding error are ties. Otherwise noise would
# rank the documents of a collapsed model, whose scores are all equal.
TIE_RELATIVE = 16 * torch.finfo(torch.float32).eps

Pairs = tuple[Tensor, Tensor]
"""(query, catalogue row) of documents to exclude, both int64."""


def _target_product(queries: Tensor, documents: Tensor) -> Tensor:
    """Return the scores of queries [m, D+1] and their targets [m, D+1], and the tolerance of a tie, [m, 2]."""
    tolerance = TIE_RELATIVE * queries.norm(dim=1) * documents.norm(dim=1)
    return torch.stack([(queries * documents).sum(dim=1), tolerance], dim=1)


def ranks_of_round(batch: SearchRound, documents: DocumentVectors) -> Tensor:
    """Return the target ranks of this rank's queries in a round, float64 [m].

    All ranks must call it.
    """
    target = batch.of_targets(documents, _target_product)
    counts = _counts(batch.vectors, documents, target, batch.excluded)
    return 1 + distributed.reduce_scatter_rows(counts)[: len(batch.rows)]


def ranks_of_vectors(queries: Tensor, documents: Tensor, target: Tensor, seen: Pairs | None = None) -> Tensor:
    """Return ranks float64 [m] of document `target[i]` for `queries[i]` by inner product, locally.

    queries [m, D+1] and documents [N, D+1] are float32 index vectors, target int64 [m].
    """
    target_scores = _target_product(queries, documents[target])
    return 1 + _counts(queries, DocumentVectors(documents), target_scores, _excluded(target, seen))


def ranks_of_scores(
    scores: Tensor, target: Tensor, seen: Pairs | None = None, unavailable: Tensor | None = None, top: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the rank of document `target[i]` in row i of `scores`, and the `top` other candidates.

    scores [m, N], exact ties only; ranks float64 [m], candidates int64 [m, top], −1 behind the last. Documents of
    `seen`, and of `unavailable` (bool [N] or [m, N]) are no candidates, unless they are the target.
    """
    target_score = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    scores = scores.clone() if unavailable is None else scores.masked_fill(unavailable, float("-inf"))
    excluded = _excluded(target, seen)
    scores[excluded.rows, excluded.positions] = float("-inf")
    best = scores.topk(min(top, scores.shape[1]), dim=1)
    candidates = best.indices.masked_fill(best.values == float("-inf"), -1)
    return 1 + _count_above(scores, target_score, torch.zeros_like(target_score)), candidates


def _excluded(target: Tensor, seen: Pairs | None) -> ExcludedDocuments:
    """Return the seen documents and the target itself."""
    rows, columns = torch.arange(len(target), device=target.device), target
    if seen is not None:
        rows, columns = torch.cat([rows, seen[0]]), torch.cat([columns, seen[1]])
    return ExcludedDocuments.of(rows, columns)


def _counts(queries: Tensor, documents: DocumentVectors, target: Tensor, excluded: ExcludedDocuments) -> Tensor:
    """Return float64 [m]: the local documents that score above the target, ties as halves."""
    counts = queries.new_zeros(len(queries), dtype=torch.float64)
    for first in range(0, len(queries), QUERIES_PER_TILE):
        last = min(first + QUERIES_PER_TILE, len(queries))
        block = excluded.block(first, last)
        tile = max(1, SCORES_PER_TILE // max(last - first, LEAST_ROWS))  # fewer rows are padded to LEAST_ROWS
        for column in range(0, len(documents), tile):
            scores = inner_products(queries[first:last], documents.vectors[column : column + tile])
            block.mask(scores, documents, column)
            counts[first:last] += _count_above(scores, target[first:last, 0], target[first:last, 1])
    return counts


def _count_above(scores: Tensor, target_score: Tensor, tolerance: Tensor) -> Tensor:
    """Count the documents of a tile that score higher, ties as halves; float64 [m]."""
    above = (scores > (target_score + tolerance).unsqueeze(1)).sum(dim=1)
    at_least = (scores >= (target_score - tolerance).unsqueeze(1)).sum(dim=1)
    return (above + at_least).double() / 2


RERANKED_AT_ONCE = 1024  # queries per round, over all ranks


@dataclass(frozen=True)
class Reranking:
    """Re-ranks the `top` best documents; the rest keep their rank."""

    reranker: Reranker
    top: int

    def ranks(self, before: Tensor, batch: SearchRound, documents: DocumentVectors) -> Tensor:
        """Return the re-ranked target ranks of this rank's queries, float64 [m]; `before`: by inner product.

        All ranks must call it.
        """
        others = unpack_keys(top_of_round(exact_search(documents), batch, self.top - 1))[1].cpu().numpy()
        within = np.flatnonzero((before <= self.top).cpu().numpy())
        rows = batch.rows.take(within)
        scores = torch.from_numpy(
            self.reranker.score(rows.query, np.concatenate([rows.doc_rows[:, None], others[within]], axis=1))
        )
        target = scores[:, :1]
        tolerance = TIE_RELATIVE * (1 + target.abs())
        above, at_least = ((scores[:, 1:] > target + sign * tolerance).sum(1).double() for sign in (1, -1))
        ranks = before.clone()
        ranks[torch.from_numpy(within).to(ranks.device)] = (1 + (above + at_least) / 2).to(ranks.device)
        return ranks


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
    `documents` is the rank's share of the document vectors, if already encoded. `rerank` re-ranks the best documents
    per query. Raises: DataError: no such split; DivergedError, on every rank: a vector is not finite (comparisons with
    NaN would rank every target first).
    """
    started = time.perf_counter()
    dataset.index(split)
    share = Share(rank, world_size, rows_per_chunk, progress)
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
        batch_ranks = ranks_of_round(batch, documents)
        if coverage and rerank is None:
            search = exact_search(documents)
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
