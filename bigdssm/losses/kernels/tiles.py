"""Score tiles: S = alpha · U Wᵀ + bias for a block of rows and a tile of columns, and the sums behind the gradients.

All products with W go through `ScoreMatrix.scores` and `Gradients.add`, with float32 (or float64) results whatever the
dtype of U and W, since rounding the *scores* to bfloat16 costs 0.2 in the exponent at alpha = 100. A device multiplies
bfloat16 vectors as they are; for a CPU they are widened, and `product_precision` says where it may narrow them again.

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
from bigdssm.losses.inputs import WANTS_ALPHA, WANTS_BETA, WANTS_U, WANTS_W, LossInputs
from bigdssm.losses.kernels.columns import Columns, Tile
from bigdssm.losses.masks import FalseNegatives, MaskMatrix, MaskPairs

# coordinates cost about 64 bytes an entry while they are made, the dense mask one byte per entry of the block
_DENSE_FROM = 1 / 32
LOG_2 = math.log(2)


@dataclass
class BlockMask:
    """The masked entries of one block of rows: coordinates, those of a tile together, or bytes; None where none."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    bounds: dict[int, tuple[int, int]] | None = None
    dense: Tensor | None = None  # [rows, N]

    @staticmethod
    def of(mask: FalseNegatives, columns: Columns, start: int, stop: int, total: int) -> BlockMask:
        """Return those of rows [start, stop): `total` entries of pairs."""
        if isinstance(mask, MaskMatrix):
            return BlockMask(dense=mask.rows(start, stop))
        assert isinstance(mask, MaskPairs)
        if total == 0:
            return BlockMask()
        if total > max(4096, int((stop - start) * columns.total * _DENSE_FROM)):
            return BlockMask(dense=mask.matrix(start, stop))
        rows, found = mask.entries(start, stop, total)
        if len(columns.tiles) == 1:
            return BlockMask(rows=rows, columns=found, bounds={0: (0, total)})
        found, order = torch.sort(found)
        width = columns.tiles[0].width
        edges = torch.arange(len(columns.tiles) + 1, device=found.device) * width
        at = torch.searchsorted(found, edges).tolist()
        bounds = {tile.start: (at[k], at[k + 1]) for k, tile in enumerate(columns.tiles)}
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

    def in_bits(self) -> ScoreMatrix:
        """Return the scores over log 2, to be exponentiated by exp2: on some CPUs in a third of the time of exp."""
        bias_N = None if self.bias_N is None else self.bias_N / LOG_2
        return replace(self, alpha=self.alpha / LOG_2, bias_N=bias_N)

    @property
    def acc(self) -> torch.dtype:
        """The dtype of scores and sums."""
        return torch.float64 if self.U_mD.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.U_mD.device

    @property
    def is_narrow(self) -> bool:
        """Products take operands of fewer bits than their results have."""
        return self.U_mD.dtype != self.acc

    @property
    def cell_bytes(self) -> int:
        """Bytes of a score, and of what it becomes as an operand."""
        return self.acc.itemsize + (self.U_mD.dtype.itemsize if self.is_narrow else 0)

    def blocks(self, height: int) -> Iterator[RowBlock]:
        """Cut the queries into blocks of at most `height` rows."""
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
        """Return memory for the scores of a block of at most `height` rows and `width` columns, if products take it."""
        size = 0 if self.is_narrow else min(height, self.U_mD.shape[0]) * width
        return torch.empty(size, dtype=self.acc, device=self.device)

    def tiles(self, block: RowBlock, buffer: Tensor, shift: float = 0.0) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """Yield each tile with its vectors [c, D] and its scores less `shift` [r, c], one over the other, unmasked."""
        for tile, W_cD in self.columns.vectors():
            yield tile, W_cD, self.scores(block, tile, W_cD, buffer, shift)

    def scores(self, block: RowBlock, tile: Tile, W_cD: Tensor, out: Tensor, shift: float = 0.0) -> Tensor:
        """Return the scores less `shift` [r, c], in the memory of `out` where `buffer` has any."""
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
        if self.beta is not None:
            self.beta[tile.columns] += G_rc.sum(0) if beta_c is None else beta_c
        G_rc = G_rc.to(W_cD.dtype)
        if self.U is not None:
            add_product(self.U[block.rows], G_rc, W_cD)
        if self.W is not None:
            add_product(self.W[tile.columns], G_rc.T, block.U_rD)


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add A B to `total`, whose dtype the product has."""
    if A.dtype == total.dtype:
        total.addmm_(A, B)
    else:
        total += torch.mm(A, B, out_dtype=total.dtype)


@contextmanager
def product_precision(x: LossInputs) -> Iterator[None]:
    """Within it products have float32 results, whatever a caller's autocast says of them.

    A CPU with bfloat16 units uses them where U and W are bfloat16. U and W lose nothing by it; G is rounded to 8 bits
    entry by entry, as the gradients are that come of it.
    """
    device = x.U.device.type
    # autocast would round scores to bfloat16, and products added in place would be added to a copy
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
