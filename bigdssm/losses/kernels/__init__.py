"""The score matrix: gather of its columns, passes over its tiles, and reduction of its gradients.

Callers (terms, masks, `contrastive_loss`) handle one value per query or per column, never a tile. The passes of the
softmax losses are Triton kernels if `triton_passes.available`, else plain torch, with the same results.

Shape legend: m queries and n columns of this rank, N columns of all ranks, D vector size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import GlobalSizes, LossInputs
from bigdssm.losses.kernels import triton_passes
from bigdssm.losses.kernels.columns import CACHED_ROWS, CACHED_WIDTH, Columns, gather_columns, strip_rows
from bigdssm.losses.kernels.torch_passes import (
    Coefficients,
    GradientSums,
    PairSums,
    RowSums,
    ScoreMatrix,
    column_pass,
    gradient_pass,
    pairwise_pass,
    product_precision,
    softmax_rows,
    value_and_derivative,
)
from bigdssm.losses.masks import Mask, mask_bytes

__all__ = [
    "Columns",
    "GradientSums",
    "LogSums",
    "PairSums",
    "RowSums",
    "ScorePasses",
    "gather_columns",
    "loss_bytes",
    "loss_sent_bytes",
    "product_precision",
    "value_and_derivative",
]


@dataclass(frozen=True)
class LogSums:
    """Log-sum-exps over the columns, and over the queries of all ranks in each column."""

    rows: RowSums
    column_N: Tensor
    of_positive_m: Tensor  # column_N of each query's positive
    shift: float | None  # subtracted from the scores in plain torch


class ScorePasses:
    """Passes of this rank's queries over the columns of all ranks.

    Scores are S = alpha · U Wᵀ + beta, plus neg_bias in query → doc, without the entries in `mask`. A pass returns sums
    over the negatives of each query, and sums over G, the gradient of the scores (None if no gradient is required).
    """

    def __init__(self, x: LossInputs, sizes: GlobalSizes, columns: Columns, mask: Mask, group: Group | None) -> None:
        self.columns, self._mask = columns, mask
        self.positive_N = x.positive + columns.local_start  # [m] global column indices
        self._x, self._sizes, self._group = x, sizes, group

    @cached_property
    def num_negatives_m(self) -> Tensor:
        """Number of negatives per query, float64; valid for weight > 0, for which the positive is masked."""
        counts_N = self.columns.negative_counts()
        return counts_N.sum() - self._mask.row_sums(counts_N)

    def softmax(
        self, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor
    ) -> tuple[RowSums, GradientSums | None]:
        """Return the log-sum-exps over columns and extra negatives, and the sums over G = weight · softmax.

        A column is weighted by its count; the softmax is also normalized over the positive's score.
        """
        columns, sums = self.columns, self._new_sums()
        biases = columns.beta, columns.neg_bias, None if columns.counts is None else columns.counts.log()
        if self._fused is not None:
            bias_N = columns.bias(*biases)
            rows = triton_passes.softmax_rows(self._fused, bias_N, positive_m, weight_m, extra_log_sum_m, sums)
        else:
            rows = softmax_rows(self._matrix(*biases), positive_m, weight_m, extra_log_sum_m, sums)
        return rows, sums

    def pairs(
        self, value: Callable[[Tensor], Tensor], positive_m: Tensor, scale_m: Tensor
    ) -> tuple[PairSums, GradientSums | None]:
        """Return the sums of a pairwise loss over the columns, and the sums over G = scale · derivative."""
        columns, sums = self.columns, self._new_sums()
        matrix, counts_N = self._matrix(columns.beta, columns.neg_bias), columns.negative_counts()
        return pairwise_pass(matrix, value, positive_m, scale_m, counts_N, sums), sums

    def log_sums(self, with_rows: bool) -> LogSums:
        """Return the column log-sum-exps and, if `with_rows`, the row log-sum-exps; a collective."""
        bias_N, neg_bias_N = self._biases(with_rows)
        shift = None
        if self._fused is not None:
            rows, column_N = triton_passes.column_pass(self._fused, bias_N, neg_bias_N, self._group)
        else:
            rows, column_N, shift = column_pass(self._matrix(bias_N), self._sizes, neg_bias_N, with_rows, self._group)
        return LogSums(rows, column_N, column_N[self.positive_N], shift)

    def softmax_gradients(
        self, log_sums: LogSums, with_rows: bool, row_weight_m: Tensor, row_lse_m: Tensor, column_weight_m: Tensor
    ) -> GradientSums | None:
        """Return the sums over G of both softmaxes; a collective.

        G = row_weight · softmax over columns, plus softmax over queries times the sum of column_weight over a column's
        pairs.
        """
        sums = self._new_sums()
        if sums is None:
            return None
        local_n = column_weight_m.new_zeros(self._x.W.shape[0]).index_add_(0, self._x.positive, column_weight_m)
        column_weight_N = distributed.all_gather_padded(local_n, self._sizes.longest, self._group)
        bias_N, neg_bias_N = self._biases(with_rows)
        coefficients = Coefficients(row_weight_m, row_lse_m, neg_bias_N, column_weight_N, log_sums.column_N)
        if self._fused is not None:
            triton_passes.gradient_pass(self._fused, bias_N, with_rows, coefficients, sums)
        else:
            gradient_pass(self._matrix(bias_N), log_sums.shift, coefficients, sums)
        return sums

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return the number of negatives of this rank's queries, and the number that the mask drops, float64.

        The positive is excluded from both once, if its column or another column of its document counts as a negative.
        """
        columns = self.columns
        counts_N = columns.negative_counts()
        counted_m = counts_N[self.positive_N] > 0
        if columns.doc_ids is not None:
            docs = columns.docs
            of_docs = counts_N.new_zeros(max(1, docs.limit)).index_add_(0, docs.codes, counts_N[columns.valid])
            of_columns = torch.zeros(columns.total, dtype=torch.bool, device=counts_N.device)
            of_columns.index_copy_(0, columns.valid, of_docs[docs.codes] > 0)
            counted_m |= of_columns[self.positive_N]
        # the positives of queries with weight > 0 are known positives, those of others may be
        rows = torch.arange(len(counted_m), device=counted_m.device)
        masked_m = self._mask.contains(rows, self.positive_N)
        entries = (counts_N.sum() - counted_m.double()).sum()
        return entries, (counts_N.sum() - self.num_negatives_m).sum() - (masked_m & counted_m).sum()

    def reduce_to_local(self, sums: GradientSums | None) -> GradientSums:
        """Return the sums over G of this rank's queries and columns, reduced over ranks; a collective.

        Must be the last call: it frees the gathered columns, and the arrays of `sums`, as early as possible.
        """
        del self.columns
        self.__dict__.pop("_fused", None)
        if sums is None:
            return GradientSums(None, None, None)
        n = self._x.W.shape[0]
        if sums.W is not None:
            sums.W = distributed.reduce_scatter_rows(sums.W, self._group)[:n]
        if sums.beta is not None:
            sums.beta = distributed.reduce_scatter_rows(sums.beta, self._group)[:n]
        return sums

    @cached_property
    def _fused(self) -> triton_passes.FusedMatrix | None:
        if not triton_passes.available(self._x):
            return None
        return triton_passes.FusedMatrix.of(self._x.U, self._sizes.alpha, self.columns, self._mask)

    def _biases(self, with_rows: bool) -> tuple[Tensor | None, Tensor | None]:
        # within a column, beta is constant and cancels
        return (self.columns.beta, self.columns.neg_bias) if with_rows else (None, None)

    def _new_sums(self) -> GradientSums | None:
        grad_flags = self._sizes.grad_flags
        return GradientSums.zeros(self._x, grad_flags, self.columns.total) if grad_flags else None

    def _matrix(self, *biases: Tensor | None) -> ScoreMatrix:
        x, bias_N = self._x, self.columns.bias(*biases)
        bias_N = None if bias_N is None else bias_N.to(x.acc)
        return ScoreMatrix(x.U.detach().to(x.operand), self.columns, self._mask, self._sizes.alpha, bias_N)


def loss_bytes(
    num_queries: int, num_columns: int, dim: int, world_size: int, *, both: bool, num_known: int,
    gathers_known: bool,
) -> int:  # fmt: skip
    """Return the bytes of a loss over all columns on a rank with a CPU, in addition to its vectors and their gradients.

    They hold the gathered columns, sums over queries and columns, tiles of scores, ids, the mask, and values per row.
    both: the loss has the column direction. num_known: known pairs of this rank; gathers_known: pairs of all ranks are
    compared.
    """
    columns = num_columns * world_size
    gathered = 4 * (columns if world_size > 1 else 0) * dim
    sums = 4 * (num_queries + columns) * dim
    pairs = (num_queries + num_known) * (world_size if gathers_known else 1)
    ids = 8 * (4 * columns + (2 * pairs if gathers_known else 2 * num_queries))
    rows = min(num_queries, CACHED_ROWS if both else strip_rows(torch.device("cpu"), columns, 4))
    mask = mask_bytes(num_queries, columns, pairs)
    scores = 2 * 4 * rows * min(CACHED_WIDTH, columns) if both else 4 * rows * columns
    return gathered + sums + scores + ids + mask + 8 * 8 * (num_queries + columns)


def loss_sent_bytes(num_columns: int, dim: int, world_size: int, *, both: bool) -> dict[str, int]:
    """Return the bytes that a loss gathers and reduces, by purpose; an all-reduce counts twice."""
    columns = num_columns * world_size
    return {
        "loss: documents' vectors": 4 * columns * dim,
        "loss: their gradients": 4 * columns * dim,
        "loss: ids and biases": 8 * 4 * columns,
        "loss: sums of columns": 2 * 8 * columns if both else 0,
    }
