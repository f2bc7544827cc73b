"""Exact ranks of target documents in the full catalogue.

rank = 1 + documents that score higher + half of those that tie. Seen documents are excluded, the target never is.
Shapes: m queries, N documents, D+1 the width of index vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.retrieval.exact_search import LEAST_ROWS, ExcludedDocuments, SearchRound, inner_products

PAIRED_QUERIES, PAIRED_DOCS = 64, 1024  # per tile of a pair scorer, which builds a vector per pair
QUERIES_AT_ONCE = 512
TILE_SCORES = 8_388_608  # per tile, 32 MiB of float32
# Vectors depend on the batch size in their last bits, so scores within rounding error are ties. Otherwise noise would
# rank the documents of a collapsed model, whose scores are all equal.
TIE_RELATIVE = 16 * torch.finfo(torch.float32).eps

Pairs = tuple[Tensor, Tensor]
"""(query, catalogue row) of documents to exclude, both int64."""


@dataclass(frozen=True)
class Scoring:
    """Scoring functions, and their tile sizes."""

    matrix: Callable[[Tensor, Tensor], Tensor]  # queries [m, …], documents [n, …] -> scores [m, n]
    target: Callable[[Tensor, Tensor], Tensor]  # queries [m, …], targets [m, …] -> [m, 2]: score, tolerance
    queries_at_once: int
    scores_at_once: int


def _target_product(queries: Tensor, documents: Tensor) -> Tensor:
    tolerance = TIE_RELATIVE * queries.norm(dim=1) * documents.norm(dim=1)
    return torch.stack([(queries * documents).sum(dim=1), tolerance], dim=1)


def inner_product_scoring() -> Scoring:
    """Score index vectors by inner product."""
    return Scoring(inner_products, _target_product, QUERIES_AT_ONCE, TILE_SCORES)


def pair_scoring(scorer: Callable[[Tensor, Tensor], Tensor]) -> Scoring:
    """Score vectors by `scorer`, which broadcasts queries and documents […, D] to scores […]."""

    @torch.no_grad()
    def matrix(queries: Tensor, documents: Tensor) -> Tensor:
        return scorer(queries[:, None], documents)

    @torch.no_grad()
    def target(queries: Tensor, documents: Tensor) -> Tensor:
        score = scorer(queries, documents)
        return torch.stack([score, TIE_RELATIVE * (1 + score.abs())], dim=1)

    return Scoring(matrix, target, PAIRED_QUERIES, PAIRED_QUERIES * PAIRED_DOCS)


def ranks_of_round(scoring: Scoring, batch: SearchRound, documents: DocumentVectors) -> Tensor:
    """Return the target ranks of this rank's queries in a round, float64 [m].

    All ranks must call it.
    """
    target = batch.of_targets(documents, scoring.target)
    counts = _counts(scoring, batch.vectors, documents, target, batch.excluded)
    return 1 + distributed.reduce_scatter_rows(counts)[: len(batch.rows)]


def ranks_of_vectors(queries: Tensor, documents: Tensor, target: Tensor, seen: Pairs | None = None) -> Tensor:
    """Return ranks float64 [m] of document `target[i]` for `queries[i]` by inner product, locally.

    queries [m, D+1] and documents [N, D+1] are float32 index vectors, target int64 [m].
    """
    scoring = inner_product_scoring()
    target_scores = scoring.target(queries, documents[target])
    return 1 + _counts(scoring, queries, DocumentVectors(documents), target_scores, _excluded(target, seen))


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


def _counts(
    scoring: Scoring, queries: Tensor, documents: DocumentVectors, target: Tensor, excluded: ExcludedDocuments
) -> Tensor:
    """Return float64 [m]: the local documents that score above the target, ties as halves."""
    counts = queries.new_zeros(len(queries), dtype=torch.float64)
    for first in range(0, len(queries), scoring.queries_at_once):
        last = min(first + scoring.queries_at_once, len(queries))
        block = excluded.block(first, last)
        tile = max(1, scoring.scores_at_once // max(last - first, LEAST_ROWS))  # fewer rows are padded to LEAST_ROWS
        for column in range(0, len(documents), tile):
            scores = scoring.matrix(queries[first:last], documents.vectors[column : column + tile])
            block.mask(scores, documents, column)
            counts[first:last] += _count_above(scores, target[first:last, 0], target[first:last, 1])
    return counts


def _count_above(scores: Tensor, target_score: Tensor, tolerance: Tensor) -> Tensor:
    """Count the documents of a tile that score higher, ties as halves; float64 [m]."""
    above = (scores > (target_score + tolerance).unsqueeze(1)).sum(dim=1)
    at_least = (scores >= (target_score - tolerance).unsqueeze(1)).sum(dim=1)
    return (above + at_least).double() / 2
