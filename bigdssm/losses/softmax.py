"""The passes over the score matrix for the softmax losses.

`softmax_rows` (query → doc) holds a strip of rows against all columns, so it knows the rows' normalisers before it
leaves the strip: three products for loss and gradients. With the other direction, or both, the columns' normalisers
are known only when every rank has seen every row: `column_pass` sums, `gradient_pass` computes the scores again; four
products.

With one shift for the whole matrix a single exponential serves both directions. It is used where the range of the
scores allows it, by a bound known before or by a check afterwards; otherwise log-sum-exp tile by tile.

Shape legend: m queries of this rank, N slots, D vector size, r rows of a strip, c columns of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.columns import Tile
from bigdssm.losses.inputs import Facts
from bigdssm.losses.tiles import Problem, Strip, Sums

_STRIP_BYTES = 16 << 20  # of scores that softmax_rows holds
STRIP_ROWS = 256  # of the passes that hold one tile


@dataclass
class RowSums:
    """Per query over the columns that are not dropped, its positive apart; float64 [m]."""

    log_sum: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Shift:
    """Subtracted from all scores before one exponential; `floor`: sums below it may have lost terms (0: cannot)."""

    value: float
    floor: float


def strip_height(num_columns: int, element_size: int) -> int:
    """Return how many rows `softmax_rows` holds at once against that many columns, of so many bytes an entry."""
    return max(32, min(1024, _STRIP_BYTES // (max(1, num_columns) * element_size)))


def softmax_rows(
    p: Problem, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor | None, sums: Sums | None
) -> RowSums:
    """Return the rows' sums and add weight · softmax, the gradient apart from the positive's, to `sums`.

    `positive_m` are the positives' scores; `extra_log_sum_m` is the log-sum-exp of negatives scored elsewhere, which
    take part in the softmax and in the sums returned.
    """
    width = p.columns.num_columns
    height = strip_height(width, p.U_mD.element_size())
    buffer = p.U_mD.new_empty(min(height, p.num_rows) * width)
    result = RowSums(torch.empty_like(positive_m), torch.empty_like(positive_m))
    for strip in p.strips(height):
        rows = slice(strip.start, strip.stop)
        E, largest_r = _strip_scores(p, strip, buffer)
        shift_r = torch.where(largest_r == -math.inf, 0.0, largest_r)
        total_r = torch.zeros_like(positive_m[rows])
        for E_rc in E:
            total_r += E_rc.sub_(shift_r[:, None]).exp_().sum(1)
        log_sum_r = total_r.log_() + shift_r
        if extra_log_sum_m is not None:
            log_sum_r = torch.logaddexp(log_sum_r, extra_log_sum_m[rows])
        result.log_sum[rows], result.largest[rows] = log_sum_r, largest_r
        if sums is not None:
            lse_r = torch.logaddexp(log_sum_r, positive_m[rows])
            scale_r = _times(weight_m[rows], (shift_r - lse_r).exp()).to(p.U_mD.dtype)
            _add_strip(p, strip, E, scale_r, sums)
    return result


def _strip_scores(p: Problem, strip: Strip, buffer: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the scores of a strip, one tensor a tile, dropped entries at −inf, and each row's largest."""
    rows = strip.stop - strip.start
    largest_r = strip.U_rD.new_full((rows,), -math.inf)
    scores = []
    for index in range(len(p.columns.tiles)):
        tile = p.columns.ready(index)
        S_rc = p.scores(strip, tile, p.columns.vectors(tile), buffer[rows * tile.at :])
        strip.mask.fill(S_rc, tile, -math.inf)
        torch.maximum(largest_r, S_rc.amax(1), out=largest_r)
        scores.append(S_rc)
    return scores, largest_r


def _add_strip(p: Problem, strip: Strip, E: list[Tensor], scale_r: Tensor, sums: Sums) -> None:
    """Add diag(scale) E to the sums; scaling the vectors spares a pass over E."""
    scaled_rD = strip.U_rD * scale_r[:, None]
    dU_rD = None if sums.dU_mD is None else torch.zeros_like(strip.U_rD)
    for tile, E_rc in zip(p.columns.tiles, E, strict=True):
        if dU_rD is not None:
            dU_rD.addmm_(E_rc, p.columns.vectors(tile))
        if sums.dW_ND is not None:
            sums.dW_ND[tile.start : tile.stop].addmm_(E_rc.T, scaled_rD)
        if sums.dbeta_N is not None:
            sums.dbeta_N[tile.start : tile.stop] += torch.mv(E_rc.T, scale_r)
    if dU_rD is not None and sums.dU_mD is not None:
        sums.dU_mD[strip.start : strip.stop] += dU_rD * scale_r[:, None]


def choose_shift(p: Problem, facts: Facts) -> Shift | None:
    """Return the shift that keeps every exponential in range, None where no single one can; the same on every rank."""
    headroom, tiny, floor = (300.0, 700.0, -600.0) if p.U_mD.dtype == torch.float64 else (40.0, 80.0, -50.0)
    reach = abs(p.alpha) * facts.norm_U * facts.norm_W
    highest = reach + facts.beta_range[1] + facts.neg_bias_range[1]
    lowest = -reach + facts.beta_range[0] + facts.neg_bias_range[0]
    if not math.isfinite(highest - lowest):
        return None
    shift = max(0.0, highest - headroom)
    return Shift(shift, 0.0 if lowest - shift >= -tiny else math.exp(floor))


def column_pass(
    p: Problem, facts: Facts, neg_bias_N: Tensor | None, rows_matter: bool, group: Group | None
) -> tuple[RowSums, Tensor, Shift | None]:
    """Return the rows' sums (with `neg_bias`), the columns' log-sum-exp [N] over all ranks, and the shift used."""
    shift = choose_shift(p, facts)
    if shift is not None:
        rows, columns_N, safe = _shifted_sums(p, neg_bias_N, shift, rows_matter, group)
        if safe:
            return rows, columns_N, shift
    return *_logarithmic_sums(p, neg_bias_N, group), None


def _shifted_sums(
    p: Problem, neg_bias_N: Tensor | None, shift: Shift, rows_matter: bool, group: Group | None
) -> tuple[RowSums, Tensor, bool]:
    total_m = torch.zeros(p.num_rows, dtype=torch.float64, device=p.U_mD.device)
    largest_m = torch.zeros_like(p.U_mD[:, 0])
    total_N = torch.zeros(p.columns.num_slots + 1, dtype=torch.float64, device=p.U_mD.device)
    factor_N = None if neg_bias_N is None else neg_bias_N.exp().to(p.U_mD.dtype)
    buffer, ones = _buffer(p), p.U_mD.new_ones(STRIP_ROWS)
    for strip in p.strips(STRIP_ROWS):
        rows = slice(strip.start, strip.stop)
        for index in range(len(p.columns.tiles)):
            tile = p.columns.ready(index)
            E_rc = p.scores(strip, tile, p.columns.vectors(tile), buffer, shift.value).exp_()
            strip.mask.fill(E_rc, tile, 0.0)
            total_N[tile.start : tile.stop] += torch.mv(E_rc.T, ones[: strip.stop - strip.start])
            if factor_N is not None:
                E_rc.mul_(factor_N[tile.start : tile.stop])
            total_m[rows] += E_rc.sum(1)
            torch.maximum(largest_m[rows], E_rc.amax(1), out=largest_m[rows])
    # a rank's verdict on its rows rides with the column sums
    total_N[-1] = float(rows_matter and not bool((total_m >= shift.floor).all()))
    distributed.all_reduce(total_N, "sum", group)
    safe = total_N[-1] == 0 and bool((total_N[p.columns.valid] >= shift.floor).all())
    rows_sums = RowSums(total_m.log_() + shift.value, largest_m.double().log_() + shift.value)
    return rows_sums, total_N[:-1].log_() + shift.value, bool(safe)


def _logarithmic_sums(p: Problem, neg_bias_N: Tensor | None, group: Group | None) -> tuple[RowSums, Tensor]:
    log_m = torch.full((p.num_rows,), -math.inf, dtype=torch.float64, device=p.U_mD.device)
    rows_sums = RowSums(log_m, log_m.clone())
    log_N = log_m.new_full((p.columns.num_slots,), -math.inf)
    buffer = _buffer(p)
    for strip in p.strips(STRIP_ROWS):
        rows = slice(strip.start, strip.stop)
        for index in range(len(p.columns.tiles)):
            tile = p.columns.ready(index)
            cols = slice(tile.start, tile.stop)
            S_rc = p.scores(strip, tile, p.columns.vectors(tile), buffer)
            strip.mask.fill(S_rc, tile, -math.inf)
            log_N[cols] = torch.logaddexp(log_N[cols], torch.logsumexp(S_rc, 0).double())
            if neg_bias_N is not None:
                S_rc += neg_bias_N[cols]
            log_m[rows] = torch.logaddexp(log_m[rows], torch.logsumexp(S_rc, 1).double())
            rows_sums.largest[rows] = torch.maximum(rows_sums.largest[rows], S_rc.amax(1).double())
    largest_N = distributed.all_reduce(log_N.clone(), "max", group)
    shift_N = torch.where(largest_N == -math.inf, 0.0, largest_N)
    total_N = distributed.all_reduce((log_N - shift_N).exp_(), "sum", group)
    return rows_sums, total_N.log_() + shift_N


@dataclass(frozen=True)
class Coefficients:
    """G_ij = row_weight_i · exp(S_ij + neg_bias_j − row_lse_i) + column_weight_j · exp(S_ij − column_log_sum_j)."""

    row_weight_m: Tensor
    row_lse_m: Tensor
    neg_bias_N: Tensor | None
    column_weight_N: Tensor
    column_log_sum_N: Tensor


def gradient_pass(p: Problem, shift: Shift | None, c: Coefficients, sums: Sums) -> None:
    """Compute the scores again and add G to `sums`; only its row part concerns beta, which cancels in the columns."""
    buffer, second = _buffer(p), _buffer(p)
    gradient = _LogarithmicGradient(c) if shift is None else _ShiftedGradient(c, shift.value, p.U_mD.dtype)
    at = 0.0 if shift is None else shift.value
    for strip in p.strips(STRIP_ROWS):
        for index in range(len(p.columns.tiles)):
            tile = p.columns.ready(index)
            W_cD = p.columns.vectors(tile)
            S_rc = p.scores(strip, tile, W_cD, buffer, at)
            row_part_c = gradient(S_rc, second[: S_rc.numel()].view_as(S_rc), strip, tile, sums.dbeta_N is not None)
            if sums.dbeta_N is not None and row_part_c is not None:
                sums.dbeta_N[tile.start : tile.stop] += row_part_c
            sums.add(strip, tile, S_rc, W_cD)


class _ShiftedGradient:
    """Turn scores less a shift into G in place, with one exponential."""

    def __init__(self, c: Coefficients, shift: float, dtype: torch.dtype) -> None:
        self.factor_N = None if c.neg_bias_N is None else c.neg_bias_N.exp().to(dtype)
        self.a_m = _times(c.row_weight_m, (shift - c.row_lse_m).exp()).to(dtype)
        self.b_N = _times(c.column_weight_N, (shift - c.column_log_sum_N).exp()).to(dtype)

    def __call__(self, S_rc: Tensor, T_rc: Tensor, strip: Strip, tile: Tile, want_row_part: bool) -> Tensor | None:
        a_r, cols = self.a_m[strip.start : strip.stop], slice(tile.start, tile.stop)
        strip.mask.fill(S_rc.exp_(), tile, 0.0)
        row_part_c = torch.mv(S_rc.T, a_r) if want_row_part else None
        if self.factor_N is None:
            torch.add(a_r[:, None], self.b_N[cols], out=T_rc)
        else:
            torch.addcmul(self.b_N[cols], a_r[:, None], self.factor_N[cols], out=T_rc)
            row_part_c = row_part_c if row_part_c is None else row_part_c * self.factor_N[cols]
        S_rc *= T_rc
        return row_part_c


class _LogarithmicGradient:
    """Turn scores into G in place, with an exponential for each direction: exact for any range of scores."""

    def __init__(self, c: Coefficients) -> None:
        self.c = c
        self.row_exponent_m = c.row_weight_m.log() - c.row_lse_m
        self.column_exponent_N = torch.where(
            c.column_weight_N > 0, c.column_weight_N.log() - c.column_log_sum_N, -math.inf
        )

    def __call__(self, S_rc: Tensor, T_rc: Tensor, strip: Strip, tile: Tile, want_row_part: bool) -> Tensor | None:
        cols = slice(tile.start, tile.stop)
        strip.mask.fill(S_rc, tile, -math.inf)
        torch.add(S_rc, self.row_exponent_m[strip.start : strip.stop, None].to(S_rc.dtype), out=T_rc)
        if self.c.neg_bias_N is not None:
            T_rc += self.c.neg_bias_N[cols]
        T_rc.exp_()
        S_rc += self.column_exponent_N[cols]
        S_rc.exp_()
        S_rc += T_rc
        return T_rc.sum(0) if want_row_part else None


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight · factor, 0 where the weight is, also where the factor is not finite."""
    return torch.where(weight > 0, weight * factor, 0.0)


def _buffer(p: Problem) -> Tensor:
    widest = max((tile.width for tile in p.columns.tiles), default=0)
    return p.U_mD.new_empty(min(STRIP_ROWS, p.num_rows) * widest)
