"""The seam: all work on the score matrix, the gather of its columns and the reduction of its gradients.

What stands above (terms, masks, the engine) sees vectors of a value per query or per column, never a tile. The passes
of the softmax losses are Triton kernels where `triton_passes.available` says so, plain torch otherwise: same results.

Shape legend: m queries and n columns of this rank, N columns of all ranks, D vector size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import GlobalSizes, LossInputs
from bigdssm.losses.kernels import triton_passes
from bigdssm.losses.kernels.columns import CACHED_ROWS, CACHED_WIDTH, Columns, gather_columns, strip_rows
from bigdssm.losses.kernels.passes import (
    Coefficients,
    PairSums,
    RowSums,
    ValueAndSlope,
    column_pass,
    gradient_pass,
    pairwise_pass,
    softmax_rows,
)
from bigdssm.losses.kernels.tiles import Gradients, ScoreMatrix, product_precision
from bigdssm.losses.masks import FalseNegatives, mask_bytes

__all__ = [
    "BothSums",
    "Columns",
    "Gradients",
    "PairSums",
    "RowSums",
    "ScorePasses",
    "gather_columns",
    "product_precision",
    "score_bytes",
]


def score_bytes(num_queries: int, num_columns: int, both_directions: bool, tile: int | None, element_size: int) -> int:
    """Return the bytes of scores that a rank holds at once on a CPU; `both_directions`: any but query → doc alone."""
    if both_directions:
        return 2 * element_size * min(CACHED_ROWS, num_queries) * min(tile or CACHED_WIDTH, num_columns)
    height = strip_rows(torch.device("cpu"), num_columns, element_size)
    return element_size * num_columns * min(num_queries, height)


@dataclass(frozen=True)
class BothSums:
    """Log-sum-exps of both directions: over the columns, and over the queries of all ranks in each positive's column.

    `add` adds row_weight · softmax over columns to the gradients, and softmax over queries times the sum of
    column_weight over a column's pairs: add(row_weight_m, row_lse_m, column_weight_m), a collective.
    """

    rows: RowSums
    of_positive_m: Tensor
    add: Callable[[Tensor, Tensor, Tensor], None]


class ScorePasses:
    """Passes of this rank's queries over the columns of all ranks; each returns sums, and adds to the gradients.

    Scores are alpha · U Wᵀ + beta, and + neg_bias in query → doc, without the entries that `mask` names.
    """

    def __init__(
        self, x: LossInputs, sizes: GlobalSizes, columns: Columns, mask: FalseNegatives, group: Group | None
    ) -> None:
        self.columns, self._mask = columns, mask
        self.positive_N = x.positive + columns.own_start  # [m] among the columns of all ranks
        self._x, self._sizes, self._group = x, sizes, group

    @cached_property
    def num_negatives_m(self) -> Tensor:
        """Each query's number of negatives, float64, for those of weight > 0: their positives are masked."""
        counts_N = self.columns.counts()
        return counts_N.sum() - self._mask.row_sums(counts_N)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return how many negatives this rank's queries have before the mask, and how many of them it drops, float64.

        A query's own document is neither, once: where its column never counts as a negative, another of it may.
        """
        columns = self.columns
        counts_N = columns.counts()
        counted_m = counts_N[self.positive_N] > 0
        if columns.doc_ids is not None:
            counted_m |= self._counts_elsewhere(counts_N)
        # the pairs of queries of weight > 0 are known positives themselves, those of others may be
        rows = torch.arange(len(counted_m), device=counted_m.device)
        masked_m = self._mask.contains(rows, self.positive_N)
        entries = (counts_N.sum() - counted_m.double()).sum()
        return entries, (counts_N.sum() - self.num_negatives_m).sum() - (masked_m & counted_m).sum()

    def _counts_elsewhere(self, counts_N: Tensor) -> Tensor:
        """Return bool [m]: whether any column of a query's own document counts as a negative."""
        columns, docs = self.columns, self.columns.docs
        counted = counts_N.new_zeros(max(1, docs.limit)).index_add_(0, docs.of_ids, counts_N[columns.valid])
        of_columns = torch.zeros(columns.total, dtype=torch.bool, device=counts_N.device)
        of_columns.index_copy_(0, columns.valid, counted[docs.of_ids] > 0)
        return of_columns[self.positive_N]

    def rows(self, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor) -> RowSums:
        """Add weight · softmax to the gradients, and return each query's log-sum-exp over columns and extra negatives.

        A column is counted as often as it was merged; the positives' scores take part in the softmax's normaliser.
        """
        columns = self.columns
        biases = columns.beta, columns.neg_bias, None if columns.copies is None else columns.copies.log()
        if self._fused is not None:
            bias_N = columns.bias(*biases)
            return triton_passes.softmax_rows(self._fused, bias_N, positive_m, weight_m, extra_log_sum_m, self._sums)
        return softmax_rows(self._matrix(*biases), positive_m, weight_m, extra_log_sum_m, self._sums)

    def pairs(self, value_and_slope: ValueAndSlope, positive_m: Tensor, scale_m: Tensor) -> PairSums:
        """Add scale · slope to the gradients, and return each query's sums over the columns of a pair loss."""
        matrix = self._matrix(self.columns.beta, self.columns.neg_bias)
        return pairwise_pass(matrix, value_and_slope, positive_m, scale_m, self.columns.counts(), self._sums)

    def both(self, with_rows: bool) -> BothSums:
        """Return the columns' log-sum-exps, and the rows' where they matter."""
        # beta is constant in a column and cancels there: without the rows it is left out
        neg_bias_N = self.columns.neg_bias if with_rows else None
        bias_N = self.columns.beta if with_rows else None
        add_products: Callable[[Coefficients, Gradients], None]
        if self._fused is not None:
            rows, log_N = triton_passes.column_pass(self._fused, bias_N, neg_bias_N, self._group)
            add_products = partial(triton_passes.gradient_pass, self._fused, bias_N, with_rows)
        else:
            matrix = self._matrix(bias_N)
            rows, log_N, shift = column_pass(matrix, self._sizes, neg_bias_N, with_rows, self._group)
            add_products = partial(gradient_pass, matrix, shift)

        def add(row_weight_m: Tensor, row_lse_m: Tensor, column_weight_m: Tensor) -> None:
            if self._sums is None:
                return
            own_n = column_weight_m.new_zeros(self._x.W.shape[0]).index_add_(0, self._x.positive, column_weight_m)
            column_weight_N = distributed.all_gather_padded(own_n, self._sizes.longest, self._group).wait()
            add_products(Coefficients(row_weight_m, row_lse_m, neg_bias_N, column_weight_N, log_N), self._sums)

        return BothSums(rows, log_N[self.positive_N], add)

    def own_gradients(self) -> Gradients:
        """Return the sums of this rank's queries and columns, over all ranks; a collective where any are wanted.

        It is the last that can be asked: what is as large as all columns is given back as soon as it can be.
        """
        del self.columns
        sums, n = self._sums or Gradients(None, None, None), self._x.W.shape[0]
        if sums.W is not None:
            sums.W = distributed.reduce_scatter_rows(sums.W, self._group)[:n]
        if sums.beta is not None:
            sums.beta = distributed.reduce_scatter_rows(sums.beta, self._group)[:n]
        return sums

    @cached_property
    def _sums(self) -> Gradients | None:
        wants = self._sizes.wants
        return Gradients.zeros(self._x, wants, self.columns.total) if wants else None

    @cached_property
    def _fused(self) -> triton_passes.FusedMatrix | None:
        if not triton_passes.available(self._x):
            return None
        return triton_passes.FusedMatrix.of(self._x.U, self._sizes.alpha, self.columns, self._mask)

    def _matrix(self, *biases: Tensor | None) -> ScoreMatrix:
        x, bias_N = self._x, self.columns.bias(*biases)
        bias_N = None if bias_N is None else bias_N.to(x.acc)
        return ScoreMatrix(x.U.detach().to(x.operand), self.columns, self._mask, self._sizes.alpha, bias_N)


def vector_bytes(num_queries: int, num_columns: int, dim: int) -> int:
    """Return what a rank's vectors and their gradients take, in float32."""
    return 2 * 4 * (num_queries + num_columns) * dim


def loss_bytes(
    num_queries: int, num_columns: int, dim: int, world_size: int, *, both: bool, tile: int | None, num_known: int,
    gathers_known: bool,
) -> int:  # fmt: skip
    """Return what a loss over all columns takes on a rank beside these; `both`: it has the column direction.

    That is the gathered columns, sums over queries and columns, tiles of scores, ids, the mask, and what is kept of
    each row. num_known: known pairs that this rank is given; gathers_known: those of all ranks are compared.
    """
    columns = num_columns * world_size
    gathered = 4 * (columns if world_size > 1 else 0) * dim
    sums = 4 * (num_queries + columns) * dim
    pairs = (num_queries + num_known) * (world_size if gathers_known else 1)
    ids = 8 * (4 * columns + (2 * pairs if gathers_known else 2 * num_queries))
    mask = mask_bytes(num_queries, columns, pairs)
    scores = score_bytes(num_queries, columns, both, tile, 4)
    return gathered + sums + scores + ids + mask + 8 * 8 * (num_queries + columns)


def loss_sent_bytes(num_columns: int, dim: int, world_size: int, *, both: bool) -> dict[str, int]:
    """Return what a loss gathers and reduces of all ranks' columns, by what for: an all-reduce counts twice."""
    columns = num_columns * world_size
    return {
        "loss: documents' vectors": 4 * columns * dim,
        "loss: their gradients": 4 * columns * dim,
        "loss: ids and biases": 8 * 4 * columns,
        "loss: sums of columns": 2 * 8 * columns if both else 0,
    }
