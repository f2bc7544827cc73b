"""The passes of the softmax losses by Triton kernels, on cards that have room for their tiles.

`softmax_rows` (query → doc) takes the log-sum-exps and dU in one pass, and dW in a second: four products. With the
other direction, or both, `column_pass` takes the log-sum-exps of rows and columns in one pass, and `gradient_pass` dU
and dW in one each: five. Scores never reach memory, and any range of them will do: there is no shift to choose.

Products have float32 results. Exponentials are float32, and so are their sums within a block of rows or a program's
share of the columns; beyond it they are float64. G is rounded to bfloat16 where the vectors are.

Shape legend: m queries of this rank, N columns of all ranks, D vector size; s splits: programs that share out a sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigdssm.distributed import Group
from bigdssm.losses.passes.softmax import Coefficients, RowSums, log_sum_over_ranks
from bigdssm.losses.passes.tiles import Gradients
from bigdssm.losses.passes.triton_matrix import LOG2_E, FusedMatrix, launch, split

_LN_2 = math.log(2)


def softmax_rows(
    matrix: FusedMatrix, bias_N: Tensor | None, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor,
    sums: Gradients | None,
) -> RowSums:  # fmt: skip
    """Return the rows' sums and write weight · softmax to `sums`, as `softmax.softmax_rows` does."""
    offset_N = matrix.offsets(bias_N)
    wants_U = sums is not None and sums.U is not None
    largest_sm, total_sm, weighted_smD, _ = _sums(matrix, offset_N, None, over_rows=False, weighted=wants_U)
    log_sum_m = torch.logaddexp(torch.logsumexp(total_sm.log() + largest_sm, 0), extra_log_sum_m)
    if sums is not None:
        lse_m = torch.logaddexp(log_sum_m, positive_m)
        if sums.U is not None and weighted_smD is not None:
            factor_sm = torch.where(weight_m > 0, weight_m * (largest_sm - lse_m).exp(), 0.0).float()
            for factor_m, weighted_mD in zip(factor_sm, weighted_smD, strict=True):
                sums.U.addcmul_(weighted_mD, factor_m[:, None])
        _write_gradients(matrix, _exponents(weight_m, lse_m), offset_N, None, Gradients(None, sums.W, sums.beta))
    return RowSums(log_sum_m, largest_sm.amax(0))


def column_pass(
    matrix: FusedMatrix, bias_N: Tensor | None, neg_bias_N: Tensor | None, group: Group | None
) -> tuple[RowSums, Tensor]:
    """Return the rows' sums (with `neg_bias`) and the columns' log-sum-exp [N] over all ranks."""
    neg_offset_N = None if neg_bias_N is None else (neg_bias_N.double() * LOG2_E).float()
    largest_sm, total_sm, _, log_N = _sums(matrix, matrix.offsets(bias_N), neg_offset_N, over_rows=True, weighted=False)
    assert log_N is not None
    rows = RowSums(torch.logsumexp(total_sm.log() + largest_sm, 0), largest_sm.amax(0))
    return rows, log_sum_over_ranks(log_N, group)


def gradient_pass(
    matrix: FusedMatrix, bias_N: Tensor | None, with_rows: bool, c: Coefficients, sums: Gradients
) -> None:
    """Compute the scores again and write G's sums; only its row part concerns beta, which cancels in the columns."""
    column_N = torch.where(c.column_weight_N > 0, c.column_weight_N.log() - c.column_log_sum_N, -math.inf)
    column_offset_N = matrix.offsets(column_N if bias_N is None else bias_N + column_N)
    row_offset_N = None
    if with_rows:
        both = [bias for bias in (bias_N, c.neg_bias_N) if bias is not None]
        row_offset_N = matrix.offsets(sum(both[1:], both[0]) if both else None)
    _write_gradients(matrix, _exponents(c.row_weight_m, c.row_lse_m), row_offset_N, column_offset_N, sums)


def _exponents(weight_m: Tensor, lse_m: Tensor) -> Tensor:
    """Return log2(weight · exp(−lse)), float32."""
    return (torch.where(weight_m > 0, weight_m.log() - lse_m, -math.inf) * LOG2_E).float()


def _sums(
    matrix: FusedMatrix, offset_N: Tensor, neg_offset_N: Tensor | None, *, over_rows: bool, weighted: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return each row's largest score and Σ exp(S − largest), float64 [s, m]; by choice Σ exp(S − largest) w, float32
    [s, m, D], and the columns' log-sum-exps over this rank's rows, float64 [N].
    """
    (m, D), N, blocks = matrix.U_mD.shape, matrix.W_ND.shape[0], matrix.blocks
    height, width = blocks.own, blocks.others
    grid = math.ceil(m / height), split(matrix, math.ceil(m / height), math.ceil(N / width))
    new = offset_N.new_empty
    largest_sm, total_sm = offset_N.new_full((grid[1], m), -math.inf), offset_N.new_zeros((grid[1], m))
    weighted_smD = new((grid[1], m, D)) if weighted else None
    of_columns = new((2, grid[0], N)) if over_rows else None
    if m and N:
        launch(
            "sums_kernel", grid, matrix.U_mD, matrix.W_ND, offset_N, offset_N if neg_offset_N is None else neg_offset_N,
            matrix.slots, matrix.bits, largest_sm, total_sm, total_sm if weighted_smD is None else weighted_smD,
            *((total_sm, total_sm) if of_columns is None else of_columns),
            *matrix.sizes, math.ceil(math.ceil(N / width) / grid[1]), matrix.alpha * LOG2_E,
            ROWS=height, COLUMNS=width, NEG_BIAS=neg_offset_N is not None, OVER_ROWS=over_rows, WEIGHTED=weighted,
            **matrix.constants,
        )  # fmt: skip
    elif weighted_smD is not None:
        weighted_smD.zero_()
    log_N = None if of_columns is None else _merge(*of_columns)
    return largest_sm.double() * _LN_2, total_sm.double(), weighted_smD, log_N


def _merge(largest_bN: Tensor, total_bN: Tensor) -> Tensor:
    """Return the log-sum-exps, float64 [N], of blocks' largest scores, in base 2, and sums less these."""
    if not largest_bN.shape[0]:
        return torch.full(largest_bN.shape[1:], -math.inf, dtype=torch.float64, device=largest_bN.device)
    largest_N = largest_bN.amax(0)
    shift_N = torch.where(largest_N == -math.inf, 0.0, largest_N)
    total_N = (largest_bN - shift_N).exp2_().mul_(total_bN).sum(0, dtype=torch.float64)
    return total_N.log_() + shift_N.double() * _LN_2


def _write_gradients(
    matrix: FusedMatrix, row_exponent_m: Tensor, row_offset_N: Tensor | None, column_offset_N: Tensor | None,
    sums: Gradients,
) -> None:  # fmt: skip
    """Write the sums over G to `sums`, which are zero; without row offsets it has no row part, and beta no gradient."""
    (m, D), N, blocks = matrix.U_mD.shape, matrix.W_ND.shape[0], matrix.blocks
    if not (m and N):
        return
    for out, by_column, own, others in ((sums.U, False, m, N), (sums.W, True, N, m)):
        beta = sums.beta if by_column and row_offset_N is not None else None
        if out is None and beta is None:
            continue
        tiles = math.ceil(others / blocks.others)
        grid = math.ceil(own / blocks.own), split(matrix, math.ceil(own / blocks.own), tiles)
        direct = out is not None and grid[1] == 1
        parts = out if direct and out is not None else row_exponent_m.new_empty((grid[1], own, D))
        of_beta = None if beta is None else row_exponent_m.new_empty((grid[1], own))
        launch(
            "gradient_kernel", grid, matrix.U_mD, matrix.W_ND,
            row_exponent_m, row_exponent_m if row_offset_N is None else row_offset_N,
            row_exponent_m if column_offset_N is None else column_offset_N, matrix.slots, matrix.bits,
            parts, parts if of_beta is None else of_beta,
            *matrix.sizes, math.ceil(tiles / grid[1]), matrix.alpha * LOG2_E,
            OWN=blocks.own, OTHERS=blocks.others, BY_COLUMN=by_column, ROW_PART=row_offset_N is not None,
            COLUMN_PART=column_offset_N is not None, BETA=beta is not None, **matrix.constants,
        )  # fmt: skip
        if out is not None and not direct:
            torch.sum(parts, 0, out=out)
        if beta is not None and of_beta is not None:
            beta += of_beta.sum(0, dtype=torch.float64)
