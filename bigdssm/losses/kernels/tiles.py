"""Score tiles: S = alpha · U Wᵀ + bias for a block of rows and a tile of columns, and gradient sums.

`ScoreMatrix.scores` and `Gradients.add` compute all products with W, with float32 (or float64) results for any dtype of
U and W: rounding the *scores* to bfloat16 would cost 0.2 in the exponent at alpha = 100. A device multiplies bfloat16
vectors directly; for a CPU they are converted to float32, and `product_precision` enables its bfloat16 units.

Shape legend: m queries of this rank, N columns of all ranks, D vector size, r rows of a block, c columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigdssm.losses import precision
from bigdssm.losses.inputs import GRAD_ALPHA, GRAD_BETA, GRAD_U, GRAD_W, LossInputs
from bigdssm.losses.kernels.columns import Columns, Tile
from bigdssm.losses.masks import FalseNegatives, MaskMatrix, MaskPairs

# coordinates need about 64 bytes per masked entry while they are computed, a dense mask one byte per entry of the block
_DENSE_FROM = 1 / 32
LOG_2 = math.log(2)


@dataclass
class BlockMask:
    """The masked entries of a block of rows: coordinates sorted by tile, or a dense matrix of bytes."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    bounds: dict[int, tuple[int, int]] | None = None
    dense: Tensor | None = None  # [rows, N]

    @staticmethod
    def of(mask: FalseNegatives, columns: Columns, start: int, stop: int, total: int) -> BlockMask:
        """Return the mask of rows [start, stop); `total` is the number of entries of a sparse mask."""
        if isinstance(mask, MaskMatrix):
            return BlockMask(dense=mask.rows(start, stop))
        assert isinstance(mask, MaskPairs)
        if total == 0:
            return BlockMask()
        if total > max(4096, int((stop - start) * columns.total * _DENSE_FROM)):
            return BlockMask(dense=mask.matrix(start, stop))
        rows, masked = mask.entries(start, stop, total)
        if len(columns.tiles) == 1:
            return BlockMask(rows=rows, columns=masked, bounds={0: (0, total)})
        masked, order = torch.sort(masked)
        width = columns.tiles[0].width
        edges = torch.arange(len(columns.tiles) + 1, device=masked.device) * width
        at = torch.searchsorted(masked, edges).tolist()
        bounds = {tile.start: (at[k], at[k + 1]) for k, tile in enumerate(columns.tiles)}
        return BlockMask(rows=rows[order], columns=masked, bounds=bounds)

    def drop(self, S: Tensor, tile: Tile) -> None:
        """Set the masked entries of a tile's scores [rows, width] to −inf, in place."""
        if self.dense is not None:
            # twice the lowest number is −inf; 5 times as fast as masked_fill_, which is not vectorized
            lowest = torch.finfo(S.dtype).min
            S.add_(self.dense[:, tile.columns], alpha=lowest).add_(self.dense[:, tile.columns], alpha=lowest)
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
    mask: FalseNegatives
    alpha: float
    bias_N: Tensor | None  # added to the scores in this pass

    def in_bits(self) -> ScoreMatrix:
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
        lengths = self.mask.block_lengths(height) if m and isinstance(self.mask, MaskPairs) else [0] * -(-m // height)
        for start, total in zip(range(0, m, height), lengths, strict=True):
            rows = slice(start, min(start + height, m))
            yield RowBlock(
                rows, self.U_mD[rows], BlockMask.of(self.mask, self.columns, rows.start, rows.stop, total)
            )  # fmt: skip

    def zeros(self) -> Tensor:
        """Return [m] in the dtype of scores."""
        return torch.zeros(self.U_mD.shape[0], dtype=self.acc, device=self.device)

    def buffer(self, height: int, width: int) -> Tensor:
        """Allocate the output of a block of at most `height` rows and `width` columns; empty for narrow operands."""
        size = 0 if self.is_narrow else min(height, self.U_mD.shape[0]) * width
        return torch.empty(size, dtype=self.acc, device=self.device)

    def tiles(self, block: RowBlock, buffer: Tensor, shift: float = 0.0) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """Yield each tile with its vectors [c, D] and unmasked scores − `shift` [r, c], all in the same buffer."""
        for tile, W_cD in self.columns.vectors():
            yield tile, W_cD, self.scores(block, tile, W_cD, buffer, shift)

    def scores(self, block: RowBlock, tile: Tile, W_cD: Tensor, out: Tensor, shift: float = 0.0) -> Tensor:
        """Return the scores − `shift` [r, c], written to `out` unless operands are narrow."""
        if self.is_narrow:
            S_rc = torch.mm(block.U_rD, W_cD.T, out_dtype=self.acc)
            if self.bias_N is None:
                return S_rc.mul_(self.alpha) if shift == 0.0 else S_rc.mul_(self.alpha).sub_(shift)
            return torch.add(self.bias_N[tile.columns] - shift, S_rc, alpha=self.alpha, out=S_rc)
        shape = block.U_rD.shape[0], tile.width
        S_rc = out[: shape[0] * shape[1]].view(shape)
        if self.bias_N is None and shift == 0.0:
            return torch.addmm(S_rc, block.U_rD, W_cD.T, beta=0, alpha=self.alpha, out=S_rc)
        bias_c = W_cD.new_full((1,), -shift) if self.bias_N is None else self.bias_N[tile.columns] - shift
        return torch.addmm(bias_c, block.U_rD, W_cD.T, alpha=self.alpha, out=S_rc)


@dataclass
class Gradients:
    """Sums over G, the gradient of the scores; None if unused."""

    U: Tensor | None  # Σ_j G_ij w_j [m, D]
    W: Tensor | None  # Σ_i G_ij u_i [N, D]
    beta: Tensor | None  # Σ_i G_ij [N]

    @staticmethod
    def zeros(x: LossInputs, grad_flags: int, num_columns: int) -> Gradients:
        """Allocate the sums that any rank requires: every rank takes part in the reductions."""
        device, size = x.U.device, x.U.shape[1]
        return Gradients(
            torch.zeros(x.U.shape, dtype=x.acc, device=device) if grad_flags & (GRAD_U | GRAD_ALPHA) else None,
            torch.zeros((num_columns, size), dtype=x.acc, device=device) if grad_flags & GRAD_W else None,
            torch.zeros(num_columns, dtype=torch.float64, device=device) if grad_flags & GRAD_BETA else None,
        )

    def add(self, block: RowBlock, tile: Tile, G_rc: Tensor, W_cD: Tensor, beta_c: Tensor | None = None) -> None:
        """Add a tile's G to the sums; `beta_c`, if given, replaces its column sums for beta."""
        if self.beta is not None:
            self.beta[tile.columns] += G_rc.sum(0) if beta_c is None else beta_c
        G_rc = G_rc.to(W_cD.dtype)
        if self.U is not None:
            add_product(self.U[block.rows], G_rc, W_cD)
        if self.W is not None:
            add_product(self.W[tile.columns], G_rc.T, block.U_rD)


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
        if x.U.dtype != torch.bfloat16 or device != "cpu" or precision.instruction_set() == "none":
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
