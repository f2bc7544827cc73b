"""The exact rank of each query's document among the whole catalogue.

rank = 1 + the number of other documents that score higher + half the number that tie. Seen documents do not count,
the target itself is never filtered. Shapes: m queries, N documents, D+1 the width of index vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.retrieval.exact_search import LEAST_ROWS, ExcludedDocuments, SearchRound, inner_products

PAIRED_QUERIES, PAIRED_DOCS = 64, 1024  # scored at once where the score is no product: each pair has its own vector
QUERIES_AT_ONCE = 512
TILE_SCORES = 8_388_608  # scores held at once, 32 MiB of float32
# A document encoded in two batches of different sizes differs in its last bits. Scores closer than rounding allows to
# tell apart are ties: otherwise a collapsed model, all of whose documents score the same, is ranked by its noise.
TIE_RELATIVE = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class SeenDocuments:
    """Catalogue rows to leave out: of query i, `values[offsets[i]:offsets[i + 1]]`."""

    values: Tensor  # int64
    offsets: Tensor  # int64 [m+1]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return (query, catalogue row) of every entry, both int64."""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths), self.values


@dataclass(frozen=True)
class Scoring:
    """How documents are scored for queries, and how many at once."""

    every: Callable[[Tensor, Tensor], Tensor]  # queries [m, …], documents [n, …] -> scores [m, n]
    own: Callable[[Tensor, Tensor], Tensor]  # queries [m, …], a document of each [m, …] -> [m, 2]: score, tolerance
    queries_at_once: int
    scores_at_once: int


def _own_product(queries: Tensor, documents: Tensor) -> Tensor:
    tolerance = TIE_RELATIVE * queries.norm(dim=1) * documents.norm(dim=1)
    return torch.stack([(queries * documents).sum(dim=1), tolerance], dim=1)


def by_product() -> Scoring:
    """Return the scoring of index vectors by inner product."""
    return Scoring(inner_products, _own_product, QUERIES_AT_ONCE, TILE_SCORES)


def by_pairs(scorer: Callable[[Tensor, Tensor], Tensor]) -> Scoring:
    """Return the scoring of vectors by `scorer`, which takes queries and documents […, D], broadcasts, returns […]."""

    @torch.no_grad()
    def every(queries: Tensor, documents: Tensor) -> Tensor:
        return scorer(queries[:, None], documents)

    @torch.no_grad()
    def own(queries: Tensor, documents: Tensor) -> Tensor:
        score = scorer(queries, documents)
        return torch.stack([score, TIE_RELATIVE * (1 + score.abs())], dim=1)

    return Scoring(every, own, PAIRED_QUERIES, PAIRED_QUERIES * PAIRED_DOCS)


def ranks_of_round(scoring: Scoring, asked: SearchRound, documents: DocumentVectors) -> Tensor:
    """Return float64 [m]: the ranks of their documents for this rank's queries of a round. A collective."""
    own = asked.of_targets(documents, scoring.own)
    return 1 + asked.reduce_local(_counts(scoring, asked.vectors, documents.vectors, own, asked.excluded))


def ranks_of_vectors(queries: Tensor, documents: Tensor, target: Tensor, seen: SeenDocuments | None = None) -> Tensor:
    """Return float64 [m]: the rank of document `target[i]` for `queries[i]` by inner product, all on this rank.

    queries [m, D+1] and documents [N, D+1] are float32 index vectors, target int64 [m].
    """
    scoring = by_product()
    own = scoring.own(queries, documents[target])
    return 1 + _counts(scoring, queries, documents, own, _left_out(target, seen))


def ranks_of_scores(scores: Tensor, target: Tensor, seen: SeenDocuments | None = None) -> Tensor:
    """Return float64 [m]: the rank of document `target[i]` in row i of `scores` [m, N]; only equal scores tie."""
    target_score = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    pairs = _left_out(target, seen).block(0, len(scores))
    return 1 + _count_above(scores, 0, target_score, torch.zeros_like(target_score), *pairs)


def _left_out(target: Tensor, seen: SeenDocuments | None) -> ExcludedDocuments:
    """Return what does not count: the seen documents and the target itself."""
    rows, columns = torch.arange(len(target), device=target.device), target
    if seen is not None:
        seen_rows, seen_columns = seen.pairs()
        rows, columns = torch.cat([rows, seen_rows]), torch.cat([columns, seen_columns])
    return ExcludedDocuments.of(rows, columns)


def _counts(scoring: Scoring, queries: Tensor, documents: Tensor, own: Tensor, left_out: ExcludedDocuments) -> Tensor:
    """Return float64 [m]: of the documents here those that score higher than each query's own, ties as halves."""
    counts = queries.new_zeros(len(queries), dtype=torch.float64)
    for first in range(0, len(queries), scoring.queries_at_once):
        last = min(first + scoring.queries_at_once, len(queries))
        pairs = left_out.block(first, last)
        tile = max(1, scoring.scores_at_once // max(last - first, LEAST_ROWS))  # few are padded to so many
        for column in range(0, len(documents), tile):
            scores = scoring.every(queries[first:last], documents[column : column + tile])
            counts[first:last] += _count_above(scores, column, own[first:last, 0], own[first:last, 1], *pairs)
    return counts


def _count_above(
    scores: Tensor, column: int, target_score: Tensor, tolerance: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Return float64 [m]: the documents of this tile that score higher, ties as halves, without (rows, columns)."""
    width = scores.shape[1]
    inside = (columns >= column) & (columns < column + width)
    scores = scores.index_put((rows[inside], columns[inside] - column), scores.new_tensor(float("-inf")))
    above = (scores > (target_score + tolerance).unsqueeze(1)).sum(dim=1)
    at_least = (scores >= (target_score - tolerance).unsqueeze(1)).sum(dim=1)
    return (above + at_least).double() / 2
