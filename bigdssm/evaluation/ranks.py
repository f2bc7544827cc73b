"""The exact rank of each query's document among the whole catalogue.

rank = 1 + the number of other documents that score higher + half the number that tie. Seen documents do not count,
the target itself is never filtered. Shapes: m queries, N documents, D+1 the width of index vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRED_QUERIES, PAIRED_DOCS = 64, 1024  # scored at once where the score is no product: each pair has its own vector
TILE_SCORES = 8_388_608  # scores held at once, 32 MiB of float32
# A document encoded in two batches of different sizes differs in its last bits. Scores closer than rounding allows to
# tell apart are ties: otherwise a collapsed model, all of whose documents score the same, is ranked by its noise.
TIE_RELATIVE = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Seen:
    """Catalogue rows to leave out: of query i, `values[offsets[i]:offsets[i + 1]]`."""

    values: Tensor  # int64
    offsets: Tensor  # int64 [m+1]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return (query, catalogue row) of every entry, both int64."""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths), self.values


def ranks_of_vectors(queries: Tensor, documents: Tensor, target: Tensor, seen: Seen | None = None) -> Tensor:
    """Return float64 [m]: the rank of document `target[i]` for `queries[i]` by inner product.

    queries [m, D+1] and documents [N, D+1] are float32 index vectors, target int64 [m].
    """
    num_docs, num_queries = len(documents), len(queries)
    tile = min(num_docs, max(1, TILE_SCORES // max(1, min(num_queries, 512))))
    ranks = []
    for first in range(0, num_queries, 512):
        block = slice(first, first + 512)
        own = documents[target[block]]
        target_score = (queries[block] * own).sum(dim=1)
        tolerance = TIE_RELATIVE * queries[block].norm(dim=1) * own.norm(dim=1)
        pairs = _pairs_of_block(seen, target, first)
        count = torch.zeros(len(own), dtype=torch.float64, device=queries.device)
        for column in range(0, num_docs, tile):
            scores = queries[block] @ documents[column : column + tile].T
            count += _count_above(scores, column, target_score, tolerance, *pairs)
        ranks.append(1 + count)
    return torch.cat(ranks) if ranks else queries.new_zeros(0, dtype=torch.float64)


@torch.no_grad()
def ranks_of_pairs(
    scorer: Callable[[Tensor, Tensor], Tensor],
    queries: Tensor,
    documents: Tensor,
    target: Tensor,
    seen: Seen | None = None,
) -> Tensor:
    """Return float64 [m]: the rank of document `target[i]` for `queries[i]` by the scores of all pairs.

    queries [m, D], documents [N, D]; `scorer` takes both […, D], broadcasts, and returns […].
    """
    ranks = []
    for first in range(0, len(queries), PAIRED_QUERIES):
        block = slice(first, first + PAIRED_QUERIES)
        target_score = scorer(queries[block], documents[target[block]])
        tolerance = TIE_RELATIVE * (1 + target_score.abs())
        pairs = _pairs_of_block(seen, target, first, PAIRED_QUERIES)
        count = torch.zeros(len(target_score), dtype=torch.float64, device=queries.device)
        for column in range(0, len(documents), PAIRED_DOCS):
            scores = scorer(queries[block, None], documents[column : column + PAIRED_DOCS])
            count += _count_above(scores, column, target_score, tolerance, *pairs)
        ranks.append(1 + count)
    return torch.cat(ranks) if ranks else queries.new_zeros(0, dtype=torch.float64)


def ranks_of_scores(scores: Tensor, target: Tensor, seen: Seen | None = None) -> Tensor:
    """Return float64 [m]: the rank of document `target[i]` in row i of `scores` [m, N]; only equal scores tie."""
    target_score = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    pairs = _pairs_of_block(seen, target, 0, len(scores))
    return 1 + _count_above(scores, 0, target_score, torch.zeros_like(target_score), *pairs)


def _pairs_of_block(seen: Seen | None, target: Tensor, first: int, size: int = 512) -> tuple[Tensor, Tensor]:
    """Return (row in the block, catalogue row) of what does not count: the seen documents and the target itself."""
    own = target[first : first + size]
    rows, columns = torch.arange(len(own), device=own.device), own
    if seen is not None:
        offsets = seen.offsets[first : first + size + 1]
        inside = Seen(seen.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        seen_rows, seen_columns = inside.pairs()
        rows, columns = torch.cat([rows, seen_rows]), torch.cat([columns, seen_columns])
    return rows, columns


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
