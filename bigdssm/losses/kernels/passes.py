"""Passes over the score matrix for softmax losses and pairwise losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import GlobalSizes
from bigdssm.losses.kernels.columns import CACHED_PAIR_ROWS, Tile, block_rows, strip_rows
from bigdssm.losses.kernels.tiles import LOG_2, Gradients, RowBlock, ScoreMatrix


@dataclass
class RowSums:
    """Log-sum-exp and maximum per query over the unmasked columns, without its positive; float64 [m]."""

    log_sum: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Shift:
    """A constant subtracted from all scores before exp; sums below `floor` may have underflowed (0: impossible)."""

    value: float
    floor: float


def softmax_rows(
    matrix: ScoreMatrix, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor, sums: Gradients | None
) -> RowSums:
    """Return the row sums and add weight · softmax, the gradient of the negatives' scores, to `sums`.

    positive_m: scores of the positives; extra_log_sum_m: log-sum-exp of the candidates, included in the softmax and in
    the returned log-sums.
    """
    width = matrix.columns.total
    height = strip_rows(matrix.device, width, matrix.cell_bytes)
    buffer = matrix.buffer(height, width)
    result = RowSums(torch.empty_like(positive_m), torch.empty_like(positive_m))
    bits = matrix.in_bits()
    for block in matrix.blocks(height):
        rows = block.rows
        E, largest_r = _block_scores(bits, block, buffer)
        shift_r = torch.where(largest_r == -math.inf, 0.0, largest_r)
        total_r = _exponentiate(E, shift_r)
        largest_r, shift_r = largest_r.double() * LOG_2, shift_r.double() * LOG_2
        log_sum_r = torch.logaddexp(total_r.log_() + shift_r, extra_log_sum_m[rows])
        result.log_sum[rows], result.largest[rows] = log_sum_r, largest_r
        if sums is not None:
            lse_r = torch.logaddexp(log_sum_r, positive_m[rows])
            scale_r = _times(weight_m[rows], (shift_r - lse_r).exp()).to(matrix.acc)
            _add_block(matrix, block, E, scale_r, sums)
        del E  # frees memory before the next block
    return result


def _block_scores(matrix: ScoreMatrix, block: RowBlock, buffer: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the scores of a block, one tensor per tile, masked entries −inf, and the maximum of each row."""
    largest_r = torch.full((block.U_rD.shape[0],), -math.inf, dtype=matrix.acc, device=matrix.device)
    scores: list[Tensor] = []
    for tile, W_cD in matrix.columns.vectors():
        S_rc = matrix.scores(block, tile, W_cD, buffer)
        buffer = buffer[S_rc.numel() :]
        block.mask.drop(S_rc, tile)
        torch.maximum(largest_r, S_rc.amax(1), out=largest_r)
        scores.append(S_rc)
    return scores, largest_r


def _exponentiate(scores: list[Tensor], shift_r: Tensor) -> Tensor:
    """Replace the scores of a block, in bits, by exp2(score − shift), in place; return the row sums, float64."""
    total_r = torch.zeros_like(shift_r, dtype=torch.float64)
    for S_rc in scores:
        total_r += S_rc.sub_(shift_r[:, None]).exp2_().sum(1)
    return total_r


def _add_block(matrix: ScoreMatrix, block: RowBlock, E: list[Tensor], scale_r: Tensor, sums: Gradients) -> None:
    """Add diag(scale) E to the sums. Unless E has to be converted, the vectors are scaled: it saves a pass over E."""
    if matrix.is_narrow:
        for (tile, W_cD), E_rc in zip(matrix.columns.vectors(), E, strict=True):
            beta_c = None if sums.beta is None else torch.mv(E_rc.T, scale_r)
            G_rc = torch.mul(E_rc, scale_r[:, None], out=torch.empty_like(E_rc, dtype=W_cD.dtype))
            sums.add(block, tile, G_rc, W_cD, beta_c)
        return
    scaled_rD = block.U_rD * scale_r[:, None]
    dU_rD = None if sums.U is None else torch.zeros_like(block.U_rD)
    for (tile, W_cD), E_rc in zip(matrix.columns.vectors(), E, strict=True):
        if dU_rD is not None:
            dU_rD.addmm_(E_rc, W_cD)
        if sums.W is not None:
            sums.W[tile.columns].addmm_(E_rc.T, scaled_rD)
        if sums.beta is not None:
            sums.beta[tile.columns] += torch.mv(E_rc.T, scale_r)
    if dU_rD is not None and sums.U is not None:
        sums.U[block.rows] += dU_rD * scale_r[:, None]


def choose_shift(matrix: ScoreMatrix, sizes: GlobalSizes) -> Shift | None:
    """Return a shift that keeps every exponential in range, None if there is none; the same on every rank."""
    headroom, tiny, floor = (300.0, 700.0, -600.0) if matrix.acc == torch.float64 else (40.0, 80.0, -50.0)
    if not math.isfinite(sizes.highest - sizes.lowest):
        return None
    shift = max(0.0, sizes.highest - headroom)
    return Shift(shift, 0.0 if sizes.lowest - shift >= -tiny else math.exp(floor))


def column_pass(
    matrix: ScoreMatrix, sizes: GlobalSizes, neg_bias_N: Tensor | None, check_rows: bool, group: Group | None
) -> tuple[RowSums, Tensor, Shift | None]:
    """Return the row sums (with `neg_bias`), the column log-sum-exps [N] over all ranks, and the shift used."""
    shift = choose_shift(matrix, sizes)
    if shift is not None:
        sums = _shifted_sums(matrix, neg_bias_N, shift, check_rows, group)
        if sums is not None:
            return *sums, shift
    return *_logarithmic_sums(matrix, neg_bias_N, group), None


def _shifted_sums(
    matrix: ScoreMatrix, neg_bias_N: Tensor | None, shift: Shift, check_rows: bool, group: Group | None
) -> tuple[RowSums, Tensor] | None:
    """Compute the sums with one exp per entry; None if those of any rank may have underflowed."""
    total_m = torch.zeros(matrix.U_mD.shape[0], dtype=torch.float64, device=matrix.device)
    largest_m = matrix.zeros()
    total_N = torch.zeros(matrix.columns.total + 1, dtype=torch.float64, device=matrix.device)
    factor_N = None if neg_bias_N is None else neg_bias_N.exp().to(matrix.acc)
    height = _height(matrix)
    buffer, ones = matrix.buffer(height, matrix.columns.widest), torch.ones_like(largest_m[:height])
    bits = matrix.in_bits()
    for block in matrix.blocks(height):
        rows = block.rows
        for tile, _, S_rc in bits.tiles(block, buffer, shift.value / LOG_2):
            block.mask.drop(S_rc, tile)
            E_rc = S_rc.exp2_()
            total_N[tile.columns] += torch.mv(E_rc.T, ones[: block.U_rD.shape[0]])
            if factor_N is not None:
                E_rc.mul_(factor_N[tile.columns])
            total_m[rows] += E_rc.sum(1)
            torch.maximum(largest_m[rows], E_rc.amax(1), out=largest_m[rows])
    # the check of this rank's rows is reduced together with the column sums
    if check_rows:
        total_N[-1:].copy_((~(total_m >= shift.floor)).any())
    distributed.all_reduce(total_N, "sum", group)
    if not bool((total_N[-1] == 0) & (total_N[matrix.columns.valid] >= shift.floor).all()):
        return None
    rows_sums = RowSums(total_m.log_() + shift.value, largest_m.double().log_() + shift.value)
    return rows_sums, total_N[:-1].log_() + shift.value


def _logarithmic_sums(matrix: ScoreMatrix, neg_bias_N: Tensor | None, group: Group | None) -> tuple[RowSums, Tensor]:
    log_m = torch.full((matrix.U_mD.shape[0],), -math.inf, dtype=torch.float64, device=matrix.device)
    rows_sums = RowSums(log_m, log_m.clone())
    log_N = log_m.new_full((matrix.columns.total,), -math.inf)
    height = _height(matrix)
    buffer = matrix.buffer(height, matrix.columns.widest)
    for block in matrix.blocks(height):
        rows = block.rows
        for tile, _, S_rc in matrix.tiles(block, buffer):
            cols = tile.columns
            block.mask.drop(S_rc, tile)
            log_N[cols] = torch.logaddexp(log_N[cols], torch.logsumexp(S_rc, 0).double())
            if neg_bias_N is not None:
                S_rc += neg_bias_N[cols]
            log_m[rows] = torch.logaddexp(log_m[rows], torch.logsumexp(S_rc, 1).double())
            rows_sums.largest[rows] = torch.maximum(rows_sums.largest[rows], S_rc.amax(1).double())
    return rows_sums, log_sum_over_ranks(log_N, group)


def log_sum_over_ranks(log_N: Tensor, group: Group | None) -> Tensor:
    """Return the elementwise log Σ exp over ranks, float64 [N]; two collectives."""
    largest_N = distributed.all_reduce(log_N.clone(), "max", group)
    shift_N = torch.where(largest_N == -math.inf, 0.0, largest_N)
    total_N = distributed.all_reduce((log_N - shift_N).exp_(), "sum", group)
    return total_N.log_() + shift_N


def _height(matrix: ScoreMatrix) -> int:
    """Return the number of rows of a block in passes that hold at most two tiles."""
    return block_rows(matrix.device, matrix.columns.widest, matrix.cell_bytes + matrix.acc.itemsize)


@dataclass(frozen=True)
class Coefficients:
    """G_ij = row_weight_i · exp(S_ij + neg_bias_j − row_lse_i) + column_weight_j · exp(S_ij − column_log_sum_j)."""

    row_weight_m: Tensor
    row_lse_m: Tensor
    neg_bias_N: Tensor | None
    column_weight_N: Tensor
    column_log_sum_N: Tensor


def gradient_pass(matrix: ScoreMatrix, shift: Shift | None, c: Coefficients, sums: Gradients) -> None:
    """Recompute the scores and add G to `sums`; beta cancels in the column part."""
    height = _height(matrix)
    buffer, second = matrix.buffer(height, matrix.columns.widest), matrix.buffer(height, matrix.columns.widest)
    gradient = _LogarithmicGradient(c) if shift is None else _ShiftedGradient(c, shift.value, matrix.acc)
    scores, at = (matrix, 0.0) if shift is None else (matrix.in_bits(), shift.value / LOG_2)
    for block in matrix.blocks(height):
        for tile, W_cD, S_rc in scores.tiles(block, buffer, at):
            T_rc = torch.empty_like(S_rc) if matrix.is_narrow else second[: S_rc.numel()].view_as(S_rc)
            beta_c = gradient(S_rc, T_rc, block, tile, sums.beta is not None)
            del T_rc
            sums.add(block, tile, S_rc, W_cD, beta_c)


class _ShiftedGradient:
    """Replaces scores − shift, in bits, by G in place, with one exp per entry."""

    def __init__(self, c: Coefficients, shift: float, dtype: torch.dtype) -> None:
        self.factor_N = None if c.neg_bias_N is None else c.neg_bias_N.exp().to(dtype)
        self.a_m = _times(c.row_weight_m, (shift - c.row_lse_m).exp()).to(dtype)
        self.b_N = _times(c.column_weight_N, (shift - c.column_log_sum_N).exp()).to(dtype)

    def __call__(self, S_rc: Tensor, T_rc: Tensor, block: RowBlock, tile: Tile, with_row_part: bool) -> Tensor | None:
        a_r, cols = self.a_m[block.rows], tile.columns
        block.mask.drop(S_rc, tile)
        S_rc.exp2_()
        row_part_c = torch.mv(S_rc.T, a_r) if with_row_part else None
        if self.factor_N is None:
            torch.add(a_r[:, None], self.b_N[cols], out=T_rc)
        else:
            torch.addcmul(self.b_N[cols], a_r[:, None], self.factor_N[cols], out=T_rc)
            row_part_c = row_part_c if row_part_c is None else row_part_c * self.factor_N[cols]
        S_rc *= T_rc
        return row_part_c


class _LogarithmicGradient:
    """Replaces scores by G in place, with one exp per entry and direction: exact for any range of scores."""

    def __init__(self, c: Coefficients) -> None:
        self.c = c
        self.row_exponent_m = c.row_weight_m.log() - c.row_lse_m
        self.column_exponent_N = torch.where(
            c.column_weight_N > 0, c.column_weight_N.log() - c.column_log_sum_N, -math.inf
        )

    def __call__(self, S_rc: Tensor, T_rc: Tensor, block: RowBlock, tile: Tile, with_row_part: bool) -> Tensor | None:
        cols = tile.columns
        block.mask.drop(S_rc, tile)
        torch.add(S_rc, self.row_exponent_m[block.rows, None].to(S_rc.dtype), out=T_rc)
        if self.c.neg_bias_N is not None:
            T_rc += self.c.neg_bias_N[cols]
        T_rc.exp_()
        S_rc += self.column_exponent_N[cols]
        S_rc.exp_()
        S_rc += T_rc
        return T_rc.sum(0) if with_row_part else None


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """Return weight · factor, 0 if the weight is 0, even for a non-finite factor."""
    return torch.where(weight > 0, weight * factor, 0.0)


# (scores of negatives, score of the positive, broadcast) → values and derivatives; may overwrite the scores
ValueAndSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class PairSums:
    """Sums of values and derivatives per query, and the best negative's score; float64 [m]."""

    value: Tensor
    slope: Tensor
    largest: Tensor

    @staticmethod
    def zero(positive_m: Tensor) -> PairSums:
        """Return the sums of no negatives."""
        zeros = torch.zeros_like(positive_m)
        return PairSums(zeros, zeros.clone(), zeros - math.inf)


def pairwise_pass(
    matrix: ScoreMatrix,
    value_and_slope: ValueAndSlope,
    positive_m: Tensor,
    scale_m: Tensor,
    counts_N: Tensor,
    sums: Gradients | None,
) -> PairSums:
    """Return the sums over the unmasked columns; add scale · count · derivative, as G, to `sums`."""
    result, dtype = PairSums.zero(positive_m), matrix.acc
    # a tile has scores, values and derivatives
    cell_bytes = matrix.cell_bytes + 2 * dtype.itemsize
    height = block_rows(matrix.device, matrix.columns.widest, cell_bytes, CACHED_PAIR_ROWS)
    buffer = matrix.buffer(height, matrix.columns.widest)
    scale_m1, positive_m1, counts_N = scale_m.to(dtype)[:, None], positive_m.to(dtype)[:, None], counts_N.to(dtype)
    for block in matrix.blocks(height):
        rows = block.rows
        for tile, W_cD, S_rc in matrix.tiles(block, buffer):
            block.mask.drop(S_rc, tile)
            torch.maximum(result.largest[rows], S_rc.amax(1).double(), out=result.largest[rows])
            value_rc, slope_rc = value_and_slope(S_rc, positive_m1[rows])
            counts_c = counts_N[tile.columns]
            result.value[rows] += torch.mv(value_rc, counts_c)
            G_rc = slope_rc.mul_(counts_c)
            result.slope[rows] += G_rc.sum(1)
            if sums is not None:
                sums.add(block, tile, G_rc.mul_(scale_m1[rows]), W_cD)
    return result
