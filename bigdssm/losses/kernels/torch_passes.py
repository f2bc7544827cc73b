"""The score matrix in plain torch: tiles of scores, and passes of the softmax and the pairwise losses over them.

S = alpha · U Wᵀ + bias, for a block of rows and a tile of columns at a time. `ScoreMatrix.scores` and
`GradientSums.add` compute all products with W, with float32 (or float64) results for any dtype of U and W: rounding the
*scores* to bfloat16 would cost 0.2 in the exponent at alpha = 100. A device multiplies bfloat16 vectors directly; for a
CPU they are converted to float32, and `product_precision` enables its bfloat16 units.

Shape legend: m queries of this rank, N columns of all ranks, D vector size, r rows of a block, c columns of a tile.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import GRAD_ALPHA, GRAD_BETA, GRAD_U, GRAD_W, GlobalSizes, LossInputs, weighted
from bigdssm.losses.kernels.columns import CACHED_PAIR_ROWS, Columns, block_rows, strip_rows
from bigdssm.losses.masks import Mask, MaskMatrix, MaskPairs, MaskTimes
from bigdssm.utils import device as devices

# coordinates need about 64 bytes per masked entry while they are computed, a dense mask one byte per entry of the block
_DENSE_FROM = 1 / 32
LOG_2 = math.log(2)


@dataclass
class BlockMask:
    """The masked entries of a block of rows: coordinates sorted by tile or a dense matrix of bytes, and times."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    bounds: dict[int, tuple[int, int]] | None = None
    dense: Tensor | None = None  # [rows, N]
    time_r: Tensor | None = None  # as in MaskTimes
    since_N: Tensor | None = None

    @staticmethod
    def of(mask: Mask, columns: Columns, start: int, stop: int, total: int) -> "BlockMask":
        """Return the mask of rows [start, stop); `total` is the number of entries of a sparse mask."""
        if isinstance(mask, MaskTimes):
            known = BlockMask.of(mask.known, columns, start, stop, total)
            return replace(known, time_r=mask.time_m[start:stop], since_N=mask.since_N)
        if isinstance(mask, MaskMatrix) or total > max(4096, int((stop - start) * columns.total * _DENSE_FROM)):
            return BlockMask(dense=mask.rows(start, stop))
        if total == 0:
            return BlockMask()
        rows, masked = mask.entries(start, stop, total)
        if len(columns.tiles) == 1:
            return BlockMask(rows=rows, columns=masked, bounds={0: (0, total)})
        masked, order = torch.sort(masked)
        edges = torch.arange(len(columns.tiles) + 1, device=masked.device) * columns.widest
        ends = torch.searchsorted(masked, edges).tolist()
        bounds = {tile.start: (ends[k], ends[k + 1]) for k, tile in enumerate(columns.tiles)}
        return BlockMask(rows=rows[order], columns=masked, bounds=bounds)

    def drop(self, S: Tensor, tile: slice) -> None:
        """Set the masked entries of a tile's scores [rows, width] to −inf, in place."""
        # twice the lowest number is −inf; 5 times as fast as masked_fill_, which is not vectorized
        lowest = torch.finfo(S.dtype).min
        if self.time_r is not None and self.since_N is not None:
            later = (self.since_N[tile] > self.time_r[:, None]).view(torch.uint8)
            S.add_(later, alpha=lowest).add_(later, alpha=lowest)
        if self.dense is not None:
            S.add_(self.dense[:, tile], alpha=lowest).add_(self.dense[:, tile], alpha=lowest)
        elif self.rows is not None:
            assert self.columns is not None and self.bounds is not None
            lo, hi = self.bounds[tile.start]
            if hi > lo:
                S[self.rows[lo:hi], self.columns[lo:hi] - tile.start] = -math.inf


@dataclass(frozen=True)
class RowBlock:
    """A block of rows of this rank's queries, with its mask."""

    rows: slice
    U_rD: Tensor
    mask: BlockMask


@dataclass
class ScoreMatrix:
    """The scores of this rank's queries and all columns; one tile exists at a time."""

    U_mD: Tensor  # in the operand dtype
    columns: Columns
    mask: Mask
    alpha: float
    bias_N: Tensor | None  # added to the scores in this pass

    def in_bits(self) -> "ScoreMatrix":
        """Return the scores divided by log 2, for exp2: on some CPUs 3 times as fast as exp."""
        bias_N = None if self.bias_N is None else self.bias_N / LOG_2
        return replace(self, alpha=self.alpha / LOG_2, bias_N=bias_N)

    @property
    def acc(self) -> torch.dtype:
        """The dtype of scores and sums."""
        return torch.float64 if self.U_mD.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.U_mD.device

    @property
    def is_narrow(self) -> bool:
        """Whether matrix operands have fewer bits than the results."""
        return self.U_mD.dtype != self.acc

    @property
    def cell_bytes(self) -> int:
        """Bytes of a score, and of its conversion to an operand."""
        return self.acc.itemsize + (self.U_mD.dtype.itemsize if self.is_narrow else 0)

    def blocks(self, height: int) -> Iterator[RowBlock]:
        """Split the queries into blocks of at most `height` rows."""
        m = self.U_mD.shape[0]
        known = self.mask.known if isinstance(self.mask, MaskTimes) else self.mask
        lengths = known.block_lengths(height) if m and isinstance(known, MaskPairs) else [0] * -(-m // height)
        for start, total in zip(range(0, m, height), lengths, strict=True):
            rows = slice(start, min(start + height, m))
            yield RowBlock(
                rows, self.U_mD[rows], BlockMask.of(self.mask, self.columns, rows.start, rows.stop, total)
            )  # fmt: skip

    def buffer(self, height: int, width: int) -> Tensor:
        """Allocate the output of a block of at most `height` rows and `width` columns; empty for narrow operands."""
        size = 0 if self.is_narrow else min(height, self.U_mD.shape[0]) * width
        return torch.empty(size, dtype=self.acc, device=self.device)

    def tiles(self, block: RowBlock, buffer: Tensor, shift: float = 0.0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each tile with its vectors [c, D] and unmasked scores − `shift` [r, c], all in the same buffer."""
        for tile, W_cD in self.columns.vectors():
            yield tile, W_cD, self.scores(block, tile, W_cD, buffer, shift)

    def scores(self, block: RowBlock, tile: slice, W_cD: Tensor, out: Tensor, shift: float = 0.0) -> Tensor:
        """Return the scores − `shift` [r, c], written to `out` unless operands are narrow."""
        if self.is_narrow:
            S_rc = torch.mm(block.U_rD, W_cD.T, out_dtype=self.acc)
            if self.bias_N is None:
                return S_rc.mul_(self.alpha) if shift == 0.0 else S_rc.mul_(self.alpha).sub_(shift)
            return torch.add(self.bias_N[tile] - shift, S_rc, alpha=self.alpha, out=S_rc)
        shape = len(block.U_rD), len(W_cD)
        S_rc = out[: shape[0] * shape[1]].view(shape)
        if self.bias_N is None and shift == 0.0:
            return torch.addmm(S_rc, block.U_rD, W_cD.T, beta=0, alpha=self.alpha, out=S_rc)
        bias_c = W_cD.new_full((1,), -shift) if self.bias_N is None else self.bias_N[tile] - shift
        return torch.addmm(bias_c, block.U_rD, W_cD.T, alpha=self.alpha, out=S_rc)


@dataclass
class GradientSums:
    """Sums over G, the gradient of the scores; None if unused."""

    U: Tensor | None  # Σ_j G_ij w_j [m, D]
    W: Tensor | None  # Σ_i G_ij u_i [N, D]
    beta: Tensor | None  # Σ_i G_ij [N]

    @staticmethod
    def zeros(x: LossInputs, grad_flags: int, num_columns: int) -> "GradientSums":
        """Allocate the sums that any rank requires: every rank takes part in the reductions."""
        device, size = x.U.device, x.U.shape[1]
        # alpha's gradient is computed from the sums of U
        return GradientSums(
            torch.zeros(x.U.shape, dtype=x.acc, device=device) if grad_flags & (GRAD_U | GRAD_ALPHA) else None,
            torch.zeros((num_columns, size), dtype=x.acc, device=device) if grad_flags & GRAD_W else None,
            torch.zeros(num_columns, dtype=torch.float64, device=device) if grad_flags & GRAD_BETA else None,
        )

    def add(self, block: RowBlock, tile: slice, G_rc: Tensor, W_cD: Tensor, beta_c: Tensor | None = None) -> None:
        """Add a tile's G to the sums; `beta_c`, if given, replaces its column sums for beta."""
        if self.beta is not None:
            self.beta[tile] += G_rc.sum(0) if beta_c is None else beta_c
        G_rc = G_rc.to(W_cD.dtype)
        if self.U is not None:
            add_product(self.U[block.rows], G_rc, W_cD)
        if self.W is not None:
            add_product(self.W[tile], G_rc.T, block.U_rD)


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add A B to `total`, computed in the dtype of `total`."""
    if A.dtype == total.dtype:
        total.addmm_(A, B)
    else:
        total += torch.mm(A, B, out_dtype=total.dtype)


@contextmanager
def product_precision(x: LossInputs) -> Iterator[None]:
    """A context in which products have float32 results, regardless of the caller's autocast.

    A CPU with bfloat16 units uses them if U and W are bfloat16. This is exact for U and W; entries of G are rounded to
    8 bits, as are the resulting gradients.
    """
    device = x.U.device.type
    # autocast would round scores to bfloat16, and in-place additions would go to a copy
    with torch.autocast(device, enabled=False):
        if x.U.dtype != torch.bfloat16 or device != "cpu" or devices.instruction_set() == "none":
            yield
            return
        backend: Any = torch.backends.mkldnn
        settings = backend.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


@dataclass
class RowSums:
    """Log-sum-exp and maximum per query over the unmasked columns, without its positive; float64 [m]."""

    log_sum: Tensor
    largest: Tensor


def softmax_rows(
    matrix: ScoreMatrix, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor, sums: GradientSums | None
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
        result.log_sum[rows], result.largest[rows] = _softmax_of_block(
            bits, block, buffer, positive_m[rows], weight_m[rows], extra_log_sum_m[rows], sums
        )
    return result


def _softmax_of_block(
    bits: ScoreMatrix, block: RowBlock, buffer: Tensor, positive_r: Tensor, weight_r: Tensor, extra_log_sum_r: Tensor,
    sums: GradientSums | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return log-sum-exp and maximum [r] of a block whose scores against all columns are held at once.

    It is separate from its caller so that they are freed before those of the next block are computed.
    """
    # scores in bits, one tensor per tile, and the maximum of each row
    U_rD = block.U_rD
    largest_r = torch.full((U_rD.shape[0],), -math.inf, dtype=bits.acc, device=bits.device)
    tiles: list[tuple[slice, Tensor, Tensor]] = []
    for tile, W_cD in bits.columns.vectors():
        S_rc = bits.scores(block, tile, W_cD, buffer)
        buffer = buffer[S_rc.numel() :]
        block.mask.drop(S_rc, tile)
        torch.maximum(largest_r, S_rc.amax(1), out=largest_r)
        tiles.append((tile, W_cD, S_rc))

    # log Σ exp, relative to the maximum; the scores become exponentials in place
    shift_r = torch.where(largest_r == -math.inf, 0.0, largest_r)
    total_r = torch.zeros_like(shift_r, dtype=torch.float64)
    for _, _, S_rc in tiles:
        total_r += S_rc.sub_(shift_r[:, None]).exp2_().sum(1)
    largest_r, shift_r = largest_r.double() * LOG_2, shift_r.double() * LOG_2
    log_sum_r = torch.logaddexp(total_r.log_() + shift_r, extra_log_sum_r)
    if sums is None:
        return log_sum_r, largest_r

    # G = diag(scale) E; unless E has to be converted, the vectors are scaled, which saves a pass over E
    lse_r = torch.logaddexp(log_sum_r, positive_r)
    # without an unmasked column E is 0, and exp(0 − lse) may be infinite
    factor_r = torch.where(largest_r == -math.inf, 0.0, (shift_r - lse_r).exp())
    scale_r = weighted(weight_r, factor_r).to(bits.acc)
    if bits.is_narrow:
        for tile, W_cD, E_rc in tiles:
            beta_c = None if sums.beta is None else torch.mv(E_rc.T, scale_r)
            G_rc = torch.mul(E_rc, scale_r[:, None], out=torch.empty_like(E_rc, dtype=W_cD.dtype))
            sums.add(block, tile, G_rc, W_cD, beta_c)
        return log_sum_r, largest_r
    scaled_rD = U_rD * scale_r[:, None]
    dU_rD = None if sums.U is None else torch.zeros_like(U_rD)
    for tile, W_cD, E_rc in tiles:
        if dU_rD is not None:
            dU_rD.addmm_(E_rc, W_cD)
        if sums.W is not None:
            sums.W[tile].addmm_(E_rc.T, scaled_rD)
        if sums.beta is not None:
            sums.beta[tile] += torch.mv(E_rc.T, scale_r)
    if dU_rD is not None and sums.U is not None:
        sums.U[block.rows] += dU_rD * scale_r[:, None]
    return log_sum_r, largest_r


def column_pass(
    matrix: ScoreMatrix, sizes: GlobalSizes, neg_bias_N: Tensor | None, check_rows: bool, group: Group | None
) -> tuple[RowSums, Tensor, float | None]:
    """Return the row sums (with `neg_bias`), the column log-sum-exps [N] over all ranks, and the shift used.

    The shift is a constant that is subtracted from all scores before exp, the same on every rank. None: no shift keeps
    every exponential in range.
    """
    headroom, tiny, smallest_log = (300.0, 700.0, -600.0) if matrix.acc == torch.float64 else (40.0, 80.0, -50.0)
    if math.isfinite(sizes.highest - sizes.lowest):
        shift = max(0.0, sizes.highest - headroom)
        # sums below it may have underflowed (0: impossible)
        floor = 0.0 if sizes.lowest - shift >= -tiny else math.exp(smallest_log)
        sums = _shifted_sums(matrix, neg_bias_N, shift, floor, check_rows, group)
        if sums is not None:
            return *sums, shift
    return *_logarithmic_sums(matrix, neg_bias_N, group), None


def _shifted_sums(
    matrix: ScoreMatrix, neg_bias_N: Tensor | None, shift: float, floor: float, check_rows: bool, group: Group | None
) -> tuple[RowSums, Tensor] | None:
    """Compute the sums with one exp per entry; None if those of any rank may have underflowed."""
    total_m = torch.zeros(matrix.U_mD.shape[0], dtype=torch.float64, device=matrix.device)
    largest_m = torch.zeros(matrix.U_mD.shape[0], dtype=matrix.acc, device=matrix.device)
    total_N = torch.zeros(matrix.columns.total + 1, dtype=torch.float64, device=matrix.device)
    factor_N = None if neg_bias_N is None else neg_bias_N.exp().to(matrix.acc)
    height = _height(matrix)
    buffer, ones = matrix.buffer(height, matrix.columns.widest), torch.ones_like(largest_m[:height])
    bits = matrix.in_bits()
    for block in matrix.blocks(height):
        rows = block.rows
        for tile, _, S_rc in bits.tiles(block, buffer, shift / LOG_2):
            block.mask.drop(S_rc, tile)
            E_rc = S_rc.exp2_()
            total_N[tile] += torch.mv(E_rc.T, ones[: block.U_rD.shape[0]])
            if factor_N is not None:
                E_rc.mul_(factor_N[tile])
            total_m[rows] += E_rc.sum(1)
            torch.maximum(largest_m[rows], E_rc.amax(1), out=largest_m[rows])
    # the check of this rank's rows is reduced together with the column sums
    if check_rows:
        total_N[-1:].copy_((~(total_m >= floor)).any())
    distributed.all_reduce(total_N, "sum", group)
    if not bool((total_N[-1] == 0) & (total_N[matrix.columns.valid] >= floor).all()):
        return None
    rows_sums = RowSums(total_m.log_() + shift, largest_m.double().log_() + shift)
    return rows_sums, total_N[:-1].log_() + shift


def _logarithmic_sums(matrix: ScoreMatrix, neg_bias_N: Tensor | None, group: Group | None) -> tuple[RowSums, Tensor]:
    log_m = torch.full((matrix.U_mD.shape[0],), -math.inf, dtype=torch.float64, device=matrix.device)
    rows_sums = RowSums(log_m, log_m.clone())
    log_N = log_m.new_full((matrix.columns.total,), -math.inf)
    height = _height(matrix)
    buffer = matrix.buffer(height, matrix.columns.widest)
    for block in matrix.blocks(height):
        rows = block.rows
        for tile, _, S_rc in matrix.tiles(block, buffer):
            block.mask.drop(S_rc, tile)
            log_N[tile] = torch.logaddexp(log_N[tile], torch.logsumexp(S_rc, 0).double())
            if neg_bias_N is not None:
                S_rc += neg_bias_N[tile]
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


def gradient_pass(matrix: ScoreMatrix, shift: float | None, c: Coefficients, sums: GradientSums) -> None:
    """Recompute the scores, replace them by G in place, and add G to `sums`; beta cancels in the column part."""
    height = _height(matrix)
    buffer, second = matrix.buffer(height, matrix.columns.widest), matrix.buffer(height, matrix.columns.widest)
    if shift is None:  # exact for any range of scores: one exp per entry and direction
        scores, offset = matrix, 0.0
        row_m = c.row_weight_m.log() - c.row_lse_m
        column_N = torch.where(c.column_weight_N > 0, c.column_weight_N.log() - c.column_log_sum_N, -math.inf)
    else:  # one exp per entry, of the scores in bits, and factors
        scores, offset = matrix.in_bits(), shift / LOG_2
        neg_factor_N = None if c.neg_bias_N is None else c.neg_bias_N.exp().to(matrix.acc)
        row_m = weighted(c.row_weight_m, (shift - c.row_lse_m).exp()).to(matrix.acc)
        column_N = weighted(c.column_weight_N, (shift - c.column_log_sum_N).exp()).to(matrix.acc)
    for block in matrix.blocks(height):
        row_r = row_m[block.rows]
        for tile, W_cD, S_rc in scores.tiles(block, buffer, offset):
            T_rc = torch.empty_like(S_rc) if matrix.is_narrow else second[: S_rc.numel()].view_as(S_rc)
            column_c, beta_c = column_N[tile], None
            block.mask.drop(S_rc, tile)
            if shift is None:
                torch.add(S_rc, row_r[:, None].to(S_rc.dtype), out=T_rc)
                if c.neg_bias_N is not None:
                    T_rc += c.neg_bias_N[tile]
                T_rc.exp_()
                S_rc += column_c
                S_rc.exp_()
                S_rc += T_rc
                if sums.beta is not None:
                    beta_c = T_rc.sum(0)
            else:
                S_rc.exp2_()
                if sums.beta is not None:
                    beta_c = torch.mv(S_rc.T, row_r)
                if neg_factor_N is None:
                    torch.add(row_r[:, None], column_c, out=T_rc)
                else:
                    torch.addcmul(column_c, row_r[:, None], neg_factor_N[tile], out=T_rc)
                    beta_c = None if beta_c is None else beta_c * neg_factor_N[tile]
                S_rc *= T_rc
            del T_rc
            sums.add(block, tile, S_rc, W_cD, beta_c)


def value_and_derivative(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return value(x), elementwise or summed over rows, and its derivatives by x, from autograd."""
    if torch.is_inference_mode_enabled():  # autograd is off, and no gradient is required
        return value(x), torch.zeros_like(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result = value(leaf)
    (derivative,) = torch.autograd.grad(result, leaf, result.new_ones(()).expand_as(result))
    return result.detach(), derivative


@dataclass
class PairSums:
    """Sums of values and derivatives per query, and the best negative's score; float64 [m]."""

    value: Tensor
    slope: Tensor
    largest: Tensor

    @staticmethod
    def zero(positive_m: Tensor) -> "PairSums":
        """Return the sums of no negatives."""
        zeros = torch.zeros_like(positive_m)
        return PairSums(zeros, zeros.clone(), zeros - math.inf)


def pairwise_pass(
    matrix: ScoreMatrix, value: Callable[[Tensor], Tensor], positive_m: Tensor, scale_m: Tensor,
    counts_N: Tensor, sums: GradientSums | None,
) -> PairSums:  # fmt: skip
    """Return the sums over the unmasked columns; add scale · count · derivative, as G, to `sums`.

    value: the loss of a score minus that of the positive.
    """
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
            S_rc -= positive_m1[rows]
            value_rc, slope_rc = value_and_derivative(value, S_rc)
            counts_c = counts_N[tile]
            result.value[rows] += torch.mv(value_rc, counts_c)
            G_rc = torch.mul(slope_rc, counts_c, out=S_rc)
            result.slope[rows] += G_rc.sum(1)
            if sums is not None:
                sums.add(block, tile, G_rc.mul_(scale_m1[rows]), W_cD)
    return result
