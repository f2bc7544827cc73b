"""Score tiles: S = alpha · U Wᵀ + bias for a block of rows and a tile of columns, and the sums behind the gradients.

All products with W go through `ScoreMatrix.scores` and `Gradients.add`, with float32 (or float64) results whatever the
dtype of U and W. bfloat16 vectors are widened, since rounding the *scores* to bfloat16 costs 0.2 in the exponent at
alpha = 100; `product_precision` says where the hardware may narrow the operands again.

Shape legend: m queries of this rank, N columns of all ranks, D vector size, r rows of a block, c columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdssm.losses.inputs import WANTS_ALPHA, WANTS_BETA, WANTS_U, WANTS_W, LossInputs
from bigdssm.losses.masks import FalseNegatives, MaskMatrix, MaskPairs
from bigdssm.losses.passes.columns import Columns, Tile

# coordinates cost about 64 bytes an entry while they are made, the dense mask one byte per entry of the block
_DENSE_FROM = 1 / 32


@dataclass
class BlockMask:
    """The masked entries of one block of rows: coordinates sorted by column, or bytes [rows, N]; None where none."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    bounds: dict[int, tuple[int, int]] | None = None
    dense: Tensor | None = None

    @staticmethod
    def of(mask: FalseNegatives, columns: Columns, start: int, stop: int) -> BlockMask:
        """Return those of rows [start, stop)."""
        if isinstance(mask, MaskMatrix):
            return BlockMask(dense=mask.rows(start, stop))
        assert isinstance(mask, MaskPairs)
        lengths = mask.row_lengths[start:stop]
        total = int(lengths.sum())
        budget = int((stop - start) * columns.total * _DENSE_FROM)
        if total == 0:
            return BlockMask()
        if total > max(budget, 4096):
            return BlockMask(dense=_dense(mask, columns.total, start, stop, budget))
        rows, found = mask.entries(start, stop)
        found, order = torch.sort(found)
        edges = torch.tensor([[tile.start, tile.stop] for tile in columns.tiles], device=found.device)
        at = torch.searchsorted(found, edges.flatten()).view(-1, 2).tolist()
        bounds = {tile.start: (lo, hi) for tile, (lo, hi) in zip(columns.tiles, at, strict=True)}
        return BlockMask(rows=rows[order], columns=found, bounds=bounds)

    def drop(self, S: Tensor, tile: Tile) -> None:
        """Make the masked entries of a tile's scores [rows, width] −inf, in place."""
        if self.dense is not None:
            # twice the lowest number is −inf; a fifth of masked_fill_'s time, which takes entry by entry
            lowest = torch.finfo(S.dtype).min
            S.add_(self.dense[:, tile.columns], alpha=lowest).add_(self.dense[:, tile.columns], alpha=lowest)
        elif self.rows is not None:
            assert self.columns is not None and self.bounds is not None
            lo, hi = self.bounds[tile.start]
            if hi > lo:
                S[self.rows[lo:hi], self.columns[lo:hi] - tile.start] = -math.inf


def _dense(mask: MaskPairs, num_columns: int, start: int, stop: int, budget: int) -> Tensor:
    dense = torch.zeros((stop - start, num_columns), dtype=torch.uint8, device=mask.row_lengths.device)
    ends = torch.cumsum(mask.row_lengths[start:stop], 0)
    lo = 0
    while lo < stop - start:
        done = int(ends[lo - 1]) if lo else 0
        hi = max(lo + 1, int(torch.searchsorted(ends, done + budget, right=True)))
        rows, columns = mask.entries(start + lo, start + hi)
        dense[rows + lo, columns] = 1
        lo = hi
    return dense


@dataclass(frozen=True)
class RowBlock:
    """Some rows of this rank's queries and what is masked in them."""

    rows: slice
    U_rD: Tensor
    mask: BlockMask


@dataclass
class ScoreMatrix:
    """The scores of this rank's queries and all columns, of which one tile exists at a time."""

    U_mD: Tensor  # in the dtype of the products
    columns: Columns
    mask: FalseNegatives
    alpha: float
    bias_N: Tensor | None  # part of the score in this pass

    def blocks(self, height: int) -> Iterator[RowBlock]:
        """Cut the queries into blocks of at most `height` rows."""
        for start in range(0, self.U_mD.shape[0], height):
            rows = slice(start, min(start + height, self.U_mD.shape[0]))
            yield RowBlock(rows, self.U_mD[rows], BlockMask.of(self.mask, self.columns, rows.start, rows.stop))

    def buffer(self, height: int, width: int) -> Tensor:
        """Return memory for the scores of a block of at most `height` rows and `width` columns."""
        return self.U_mD.new_empty(min(height, self.U_mD.shape[0]) * width)

    def tiles(self, block: RowBlock, buffer: Tensor, shift: float = 0.0) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """Yield each tile with its vectors [c, D] and its scores less `shift` [r, c], one over the other, unmasked."""
        for tile, W_cD in self.columns.arriving():
            yield tile, W_cD, self.scores(block, tile, W_cD, buffer, shift)

    def scores(self, block: RowBlock, tile: Tile, W_cD: Tensor, out: Tensor, shift: float = 0.0) -> Tensor:
        """Write the scores less `shift` into the memory of `out` and return them [r, c]."""
        shape = block.U_rD.shape[0], tile.width
        S_rc = out[: shape[0] * shape[1]].view(shape)
        if self.bias_N is None and shift == 0.0:
            return torch.addmm(S_rc, block.U_rD, W_cD.T, beta=0, alpha=self.alpha, out=S_rc)
        bias_c = W_cD.new_full((1,), -shift) if self.bias_N is None else self.bias_N[tile.columns] - shift
        return torch.addmm(bias_c, block.U_rD, W_cD.T, alpha=self.alpha, out=S_rc)


@dataclass
class Gradients:
    """Sums over G, the gradient of the scores: Σ_j G_ij w_j [m, D], Σ_i G_ij u_i [N, D] and Σ_i G_ij [N]; or None."""

    U: Tensor | None
    W: Tensor | None
    beta: Tensor | None

    @staticmethod
    def zeros(x: LossInputs, wants: int, num_columns: int) -> Gradients:
        """Start with what any rank wants: every rank takes part in the reductions over ranks."""
        device, size = x.U.device, x.U.shape[1]
        return Gradients(
            torch.zeros(x.U.shape, dtype=x.acc, device=device) if wants & (WANTS_U | WANTS_ALPHA) else None,
            torch.zeros((num_columns, size), dtype=x.acc, device=device) if wants & WANTS_W else None,
            torch.zeros(num_columns, dtype=torch.float64, device=device) if wants & WANTS_BETA else None,
        )

    def add(self, block: RowBlock, tile: Tile, G_rc: Tensor, W_cD: Tensor, beta_c: Tensor | None = None) -> None:
        """Add a tile's G to the sums, and `beta_c` to beta's where only a part of G concerns it."""
        if self.U is not None:
            self.U[block.rows].addmm_(G_rc, W_cD)
        if self.W is not None:
            self.W[tile.columns].addmm_(G_rc.T, block.U_rD)
        if self.beta is not None:
            self.beta[tile.columns] += G_rc.sum(0) if beta_c is None else beta_c


@contextmanager
def product_precision(x: LossInputs) -> Iterator[None]:
    """Within it products have float32 results, whatever a caller's autocast says of them.

    A CPU with bfloat16 units uses them where U and W are bfloat16. U and W lose nothing by it; G is rounded to 8 bits
    entry by entry, as the gradients are that come of it.
    """
    device = x.U.device.type
    # autocast would round scores to bfloat16, and products added in place would be added to a copy
    with torch.autocast(device, enabled=False):
        if x.U.dtype != torch.bfloat16 or device != "cpu":
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
