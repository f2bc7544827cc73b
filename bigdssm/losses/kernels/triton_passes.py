"""Passes of the softmax losses with Triton kernels: availability, block sizes, the packed mask."""

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bigdssm.distributed import Group
from bigdssm.losses.inputs import LossInputs, add_biases
from bigdssm.losses.kernels.columns import Columns
from bigdssm.losses.kernels.torch_passes import Coefficients, GradientSums, RowSums, log_sum_over_ranks
from bigdssm.losses.masks import MASK_TILE, Mask, MaskPairs

LARGEST_D = 256  # the largest vector size whose sums fit into a program's registers
SHARED_BYTES = 168 << 10  # shared memory of the largest kernel on an H100 (198 KB on a B200); both have 227 KB
LOG2_E = 1 / math.log(2)  # kernels compute scores in base 2
_LN_2 = math.log(2)
_MOST_SPLITS = 16
_PARTS_BYTES = 1 << 29  # of the sums of all splits, which are added up
_WRITING_TILES = 6  # cost of writing and adding up the sums of a program, in tiles
_PAIRS_AT_ONCE = 1 << 23
_CELLS_AT_ONCE = 1 << 28  # bytes of the rows that are packed at once
_ROW_BLOCKS_AT_ONCE = 64  # with column sums: two numbers per block and column, 512 bytes per column


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a kernel: `outer` rows (or columns) per program, which loops over blocks of `inner`."""

    outer: int
    inner: int
    warps: int
    stages: int


def available(x: LossInputs) -> bool:
    """Return whether the kernels apply: CUDA, bfloat16 or float32, D ≤ LARGEST_D, enough shared memory."""
    is_supported = x.U.is_cuda and x.U.dtype in (torch.bfloat16, torch.float32) and x.U.shape[1] <= LARGEST_D
    return is_supported and _can_run(x.U.device)


@cache
def _can_run(device: torch.device) -> bool:
    properties: Any = torch.cuda.get_device_properties(device)
    return find_spec("triton") is not None and properties.shared_memory_per_block_optin >= SHARED_BYTES


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass
class FusedMatrix:
    """The kernel arguments for the scores of this rank's queries and all columns."""

    U_mD: Tensor
    W_ND: Tensor  # zeros in unused rows; the row stride may exceed D
    valid: Tensor
    alpha: float
    slots: Tensor  # int32 [row tiles, column tiles]: index into `bits`, −1 for a tile without masked entries
    bits: Tensor  # int64 [tiles, 2, 128]: a word per row and 64 columns, bit 1 for a masked entry

    @staticmethod
    def of(U_mD: Tensor, alpha: float, columns: Columns, mask: Mask) -> "FusedMatrix":
        """Pack the mask, and make the vectors contiguous if needed."""
        U_mD, W_ND = U_mD.detach().contiguous(), columns.W
        W_ND = W_ND if W_ND.stride(1) == 1 else W_ND.contiguous()
        slots, bits = mask_tiles(mask, len(U_mD), len(W_ND), U_mD.device)
        return FusedMatrix(U_mD, W_ND, columns.valid, alpha, slots, bits)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Run-time sizes: m, N, row stride of W in units of `_aligned`, number of column tiles."""
        return *self.U_mD.shape[:1], *self.W_ND.shape[:1], self.W_ND.stride(0) // self._aligned, self.slots.shape[1]

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants, and options of the compiler."""
        D, blocks = self.U_mD.shape[1], self.blocks
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
        return {"ALIGNED": self._aligned, "D": D, "BLOCK_D": max(16, 1 << (D - 1).bit_length()), **options}

    @property
    def _aligned(self) -> int:
        """Alignment of W's rows in numbers, up to 16 bytes, the width of a vector load."""
        return math.gcd(self.W_ND.stride(0), 16 // self.W_ND.element_size())

    @property
    def blocks(self) -> Blocks:
        """Block sizes of the kernels: no register spills on an H100, and at most SHARED_BYTES."""
        if self.U_mD.dtype == torch.float32:  # without tensor cores, which would round the operands
            return Blocks(outer=64, inner=32, warps=8, stages=2)
        dim = self.U_mD.shape[1]
        if dim <= 64:
            return Blocks(outer=128, inner=64, warps=4, stages=3)  # two programs per multiprocessor
        return Blocks(outer=128, inner=128 if dim <= 128 else 64, warps=8, stages=3)

    def offsets(self, bias_N: Tensor | None) -> Tensor:
        """Return the bias in base 2, float32 [N], −inf for unused columns."""
        offset_N = torch.full(self.W_ND.shape[:1], -math.inf, dtype=torch.float32, device=self.W_ND.device)
        if bias_N is None:
            return offset_N.index_fill_(0, self.valid, 0.0)
        return offset_N.index_copy_(0, self.valid, (bias_N[self.valid].double() * LOG2_E).float())


def mask_tiles(mask: Mask, num_rows: int, num_columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pack a mask into `slots` and `bits`; the host synchronizes once, to read the number of entries."""
    shape = math.ceil(num_rows / MASK_TILE), math.ceil(num_columns / MASK_TILE)
    tiles = shape[0] * shape[1]
    if not isinstance(mask, MaskPairs):  # pack the rows of bytes of all tiles
        bits = torch.empty((tiles, 2, MASK_TILE), dtype=torch.int64, device=device)
        height = max(1, _CELLS_AT_ONCE // (MASK_TILE * max(1, num_columns)))  # row tiles
        for first in range(0, shape[0] if tiles else 0, height):
            matrix = mask.rows(first * MASK_TILE, min((first + height) * MASK_TILE, num_rows))
            grid = math.ceil(len(matrix) / MASK_TILE), shape[1]
            launch("pack_kernel", grid, matrix, bits[first * shape[1] :], len(matrix), num_columns, shape[1])
        return torch.arange(tiles, dtype=torch.int32, device=device).view(shape), bits
    lengths = mask.block_lengths(MASK_TILE)
    total = sum(lengths)
    slots = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    bits = torch.zeros((max(1, min(total, tiles)), 2, MASK_TILE), dtype=torch.int64, device=device)
    used = torch.zeros((), dtype=torch.int64, device=device)
    height = max(1, _PAIRS_AT_ONCE * shape[0] // max(1, total))
    for first in range(0, shape[0] if total else 0, height):
        start, stop = first * MASK_TILE, min((first + height) * MASK_TILE, num_rows)
        row, column = mask.entries(start, stop, sum(lengths[first : first + height]))
        tile = (row + start) // MASK_TILE * shape[1] + column // MASK_TILE
        here = torch.zeros(tiles, dtype=torch.bool, device=device).index_fill_(0, tile, True)
        order = torch.cumsum(here, 0) + used  # 1-based number of these tiles
        slots = torch.where(here, (order - 1).int(), slots)
        used = order[-1]
        word = (slots[tile] * 2 + column % MASK_TILE // 64) * MASK_TILE + row % MASK_TILE
        # entries are unique: the sum of bits is their union, in any order
        bits.view(-1).index_add_(0, word, torch.ones_like(column) << column % 64)
    return slots.view(shape), bits


def launch(kernel: str, grid: tuple[int, int], first: Tensor, *arguments: object, **options: object) -> None:
    """Launch the kernel of that name on the device of `first`."""
    from bigdssm.losses.kernels import triton_kernels

    with torch.cuda.device_of(first):
        getattr(triton_kernels, kernel)[grid](first, *arguments, **options)


def split(matrix: FusedMatrix, outer: int, tiles: int) -> int:
    """Return the number of programs that share each of `outer` blocks' sums over `tiles`, to fill the device."""
    programs = 8 // matrix.blocks.warps  # per multiprocessor, at the same time
    concurrent, tiles = _multiprocessors(matrix.U_mD.device) * programs, max(1, tiles)

    def cost(splits: int) -> int:
        return math.ceil(outer * splits / concurrent) * (math.ceil(tiles / splits) + _WRITING_TILES)

    sum_bytes = 4 * max(1, outer) * matrix.blocks.outer * matrix.U_mD.shape[1]
    most = max(1, min(_MOST_SPLITS, tiles, _PARTS_BYTES // sum_bytes))
    splits = min(range(1, most + 1), key=cost)
    return math.ceil(tiles / math.ceil(tiles / splits))  # no split is empty


def softmax_rows(
    matrix: FusedMatrix, bias_N: Tensor | None, positive_m: Tensor, weight_m: Tensor, extra_log_sum_m: Tensor,
    sums: GradientSums | None,
) -> RowSums:  # fmt: skip
    """Return the row sums and write weight · softmax to `sums`, as `torch_passes.softmax_rows` does."""
    offset_N = matrix.offsets(bias_N)
    with_U = sums is not None and sums.U is not None
    largest_sm, total_sm, weighted_smD, _ = _sums(matrix, offset_N, None, over_rows=False, weighted=with_U)
    log_sum_m = torch.logaddexp(torch.logsumexp(total_sm.log() + largest_sm, 0), extra_log_sum_m)
    if sums is not None:
        lse_m = torch.logaddexp(log_sum_m, positive_m)
        if sums.U is not None and weighted_smD is not None:
            factor_sm = torch.where(weight_m > 0, weight_m * (largest_sm - lse_m).exp(), 0.0).float()
            for factor_m, weighted_mD in zip(factor_sm, weighted_smD, strict=True):
                sums.U.addcmul_(weighted_mD, factor_m[:, None])
        _write_gradients(matrix, _exponents(weight_m, lse_m), offset_N, None, GradientSums(None, sums.W, sums.beta))
    return RowSums(log_sum_m, largest_sm.amax(0))


def column_pass(
    matrix: FusedMatrix, bias_N: Tensor | None, neg_bias_N: Tensor | None, group: Group | None
) -> tuple[RowSums, Tensor]:
    """Return the row sums (with `neg_bias`) and the column log-sum-exps [N] over all ranks."""
    neg_offset_N = None if neg_bias_N is None else (neg_bias_N.double() * LOG2_E).float()
    largest_sm, total_sm, _, log_N = _sums(matrix, matrix.offsets(bias_N), neg_offset_N, over_rows=True, weighted=False)
    assert log_N is not None
    rows = RowSums(torch.logsumexp(total_sm.log() + largest_sm, 0), largest_sm.amax(0))
    return rows, log_sum_over_ranks(log_N, group)


def gradient_pass(
    matrix: FusedMatrix, bias_N: Tensor | None, with_rows: bool, c: Coefficients, sums: GradientSums
) -> None:
    """Recompute the scores and write the sums of G, as `torch_passes.gradient_pass` does."""
    column_N = torch.where(c.column_weight_N > 0, c.column_weight_N.log() - c.column_log_sum_N, -math.inf)
    column_offset_N = matrix.offsets(column_N if bias_N is None else bias_N + column_N)
    row_offset_N = matrix.offsets(add_biases(bias_N, c.neg_bias_N)) if with_rows else None
    _write_gradients(matrix, _exponents(c.row_weight_m, c.row_lse_m), row_offset_N, column_offset_N, sums)


def _exponents(weight_m: Tensor, lse_m: Tensor) -> Tensor:
    """Return log2(weight · exp(−lse)), float32."""
    return (torch.where(weight_m > 0, weight_m.log() - lse_m, -math.inf) * LOG2_E).float()


def _sums(
    matrix: FusedMatrix, offset_N: Tensor, neg_offset_N: Tensor | None, *, over_rows: bool, weighted: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the maximum of each row and Σ exp(S − maximum), float64 [s, m].

    weighted: also Σ exp(S − maximum) w, float32 [s, m, D]; over_rows: also the column log-sum-exps over this rank's
    rows, float64 [N].
    """
    (m, D), N = matrix.U_mD.shape, matrix.W_ND.shape[0]
    height, width = matrix.blocks.outer, matrix.blocks.inner
    row_blocks, tiles = math.ceil(m / height), math.ceil(N / width)
    at_once = min(row_blocks, _ROW_BLOCKS_AT_ONCE) if over_rows else row_blocks
    splits = split(matrix, at_once, tiles)
    new = offset_N.new_empty
    largest_sm, total_sm = offset_N.new_full((splits, m), -math.inf), offset_N.new_zeros((splits, m))
    weighted_smD = new((splits, m, D)) if weighted else None
    of_columns = new((2, at_once, N)) if over_rows else None
    log_N = torch.full((N,), -math.inf, dtype=torch.float64, device=offset_N.device) if over_rows else None
    for first in range(0, row_blocks if N else 0, max(1, at_once)):
        launched = min(at_once, row_blocks - first)
        launch(
            "sums_kernel", (launched, splits), matrix.U_mD, matrix.W_ND,
            offset_N, offset_N if neg_offset_N is None else neg_offset_N,
            matrix.slots, matrix.bits, largest_sm, total_sm, total_sm if weighted_smD is None else weighted_smD,
            *((total_sm, total_sm) if of_columns is None else of_columns),
            first, *matrix.sizes, math.ceil(tiles / splits), matrix.alpha * LOG2_E,
            ROWS=height, COLUMNS=width, NEG_BIAS=neg_offset_N is not None, OVER_ROWS=over_rows, WEIGHTED=weighted,
            **matrix.constants,
        )  # fmt: skip
        if of_columns is not None and log_N is not None:
            largest_bN, total_bN = of_columns[:, :launched]
            torch.logaddexp(log_N, _log_sum_of_blocks(largest_bN, total_bN), out=log_N)
    if weighted_smD is not None and not N:
        weighted_smD.zero_()
    return largest_sm.double() * _LN_2, total_sm.double(), weighted_smD, log_N


def _log_sum_of_blocks(largest_bN: Tensor, total_bN: Tensor) -> Tensor:
    """Return the natural log of Σ_b total · 2^largest, float64 [N]; `largest_bN` is overwritten."""
    largest_N = largest_bN.amax(0)
    shift_N = torch.where(largest_N == -math.inf, 0.0, largest_N)
    total_N = largest_bN.sub_(shift_N).exp2_().mul_(total_bN).sum(0, dtype=torch.float64)
    return total_N.log_() + shift_N.double() * _LN_2


def _write_gradients(
    matrix: FusedMatrix, row_exponent_m: Tensor, row_offset_N: Tensor | None, column_offset_N: Tensor | None,
    sums: GradientSums,
) -> None:  # fmt: skip
    """Write the sums over G to `sums`, which must be zero; without row offsets, G has no row part."""
    (m, D), N, blocks = matrix.U_mD.shape, matrix.W_ND.shape[0], matrix.blocks
    if not (m and N):
        return
    for out, by_column, outer, inner in ((sums.U, False, m, N), (sums.W, True, N, m)):
        beta = sums.beta if by_column and row_offset_N is not None else None
        if out is None and beta is None:
            continue
        tiles = math.ceil(inner / blocks.inner)
        grid = math.ceil(outer / blocks.outer), split(matrix, math.ceil(outer / blocks.outer), tiles)
        direct = out is not None and grid[1] == 1
        parts = out if direct and out is not None else row_exponent_m.new_empty((grid[1], outer, D))
        of_beta = None if beta is None else row_exponent_m.new_empty((grid[1], outer))
        launch(
            "gradient_kernel", grid, matrix.U_mD, matrix.W_ND,
            row_exponent_m, row_exponent_m if row_offset_N is None else row_offset_N,
            row_exponent_m if column_offset_N is None else column_offset_N, matrix.slots, matrix.bits,
            parts, parts if of_beta is None else of_beta,
            *matrix.sizes, math.ceil(tiles / grid[1]), matrix.alpha * LOG2_E,
            OUTER=blocks.outer, INNER=blocks.inner, BY_COLUMN=by_column, ROW_PART=row_offset_N is not None,
            COLUMN_PART=column_offset_N is not None, BETA=beta is not None, **matrix.constants,
        )  # fmt: skip
        if out is not None and not direct:
            torch.sum(parts, 0, out=out)
        if beta is not None and of_beta is not None:
            beta += of_beta.sum(0, dtype=torch.float64)
