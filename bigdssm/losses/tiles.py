"""Score tiles: S = alpha · U Wᵀ + bias for a strip of rows and a tile of columns, and the sums behind the gradients.

This is the seam for other devices: all products with W go through `Problem.scores` and `Sums.add`, with float32 (or
float64) results whatever the dtype of U and W. bfloat16 vectors are widened, since rounding the *scores* to bfloat16
costs 0.2 in the exponent at alpha = 100; `product_precision` says where the hardware may narrow the operands again.

Shape legend: m queries of this rank, N slots, D vector size, r rows of a strip, c columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdssm.losses.columns import Columns, Tile
from bigdssm.losses.inputs import WANTS_ALPHA, WANTS_BETA, WANTS_U, WANTS_W, Facts, LossInputs
from bigdssm.losses.masks import DropPlan, StripMask

TILE_WIDTH = 1024  # columns: wide enough for the products, and a tile of scores stays in the cache


@dataclass(frozen=True)
class Strip:
    """Rows [start, stop) of this rank's queries and what is dropped in them."""

    start: int
    stop: int
    U_rD: Tensor
    mask: StripMask


@dataclass
class Problem:
    """Everything the passes over the score matrix read."""

    U_mD: Tensor  # in the dtype of the products
    columns: Columns
    drops: DropPlan
    alpha: float
    bias_N: Tensor | None  # part of the score in this pass

    @property
    def num_rows(self) -> int:
        """m."""
        return self.U_mD.shape[0]

    def strips(self, height: int) -> Iterator[Strip]:
        """Cut the queries into strips of at most `height` rows."""
        for start in range(0, self.num_rows, height):
            stop = min(start + height, self.num_rows)
            yield Strip(start, stop, self.U_mD[start:stop], self.drops.strip(start, stop))

    def scores(self, strip: Strip, tile: Tile, W_cD: Tensor, out: Tensor, shift: float = 0.0) -> Tensor:
        """Write the scores less `shift` into the memory of `out` and return them [r, c]."""
        S_rc = out[: (strip.stop - strip.start) * tile.width].view(strip.stop - strip.start, tile.width)
        if self.bias_N is None and shift == 0.0:
            return torch.addmm(S_rc, strip.U_rD, W_cD.T, beta=0, alpha=self.alpha, out=S_rc)
        bias_c = W_cD.new_full((1,), -shift) if self.bias_N is None else self.bias_N[tile.start : tile.stop] - shift
        return torch.addmm(bias_c, strip.U_rD, W_cD.T, alpha=self.alpha, out=S_rc)


@dataclass
class Sums:
    """Sums over G, the gradient of the scores: Σ_j G_ij w_j, Σ_i G_ij u_i and Σ_i G_ij; None where unused."""

    dU_mD: Tensor | None
    dW_ND: Tensor | None
    dbeta_N: Tensor | None

    @staticmethod
    def like(x: LossInputs, facts: Facts, columns: Columns) -> Sums:
        """Start at zero with what any rank wants: every rank takes part in the reductions over ranks."""
        device, size = x.U.device, x.U.shape[1]
        own = bool(facts.wants & (WANTS_U | WANTS_ALPHA))
        return Sums(
            torch.zeros((x.U.shape[0], size), dtype=x.acc, device=device) if own else None,
            torch.zeros((columns.num_slots, size), dtype=x.acc, device=device) if facts.wants & WANTS_W else None,
            torch.zeros(columns.num_slots, dtype=torch.float64, device=device) if facts.wants & WANTS_BETA else None,
        )

    def add(self, strip: Strip, tile: Tile, G_rc: Tensor, W_cD: Tensor) -> None:
        """Add a tile's G to the vectors' sums."""
        if self.dU_mD is not None:
            self.dU_mD[strip.start : strip.stop].addmm_(G_rc, W_cD)
        if self.dW_ND is not None:
            self.dW_ND[tile.start : tile.stop].addmm_(G_rc.T, strip.U_rD)


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


def positive_scores(x: LossInputs, with_beta: bool = True) -> Tensor:
    """Return the scores of the positives, float64 [m]."""
    products = (x.U.detach().to(x.acc) * x.W.detach()[x.positive].to(x.acc)).sum(1).double() * float(x.alpha.detach())
    beta_m = x.beta_of(x.positive) if with_beta else None
    return products if beta_m is None else products + beta_m


def add_biases(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the sum of those that are there."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), exact for all x (torch's own is cut off at 20, an error of 2e-9)."""
    return torch.logaddexp(x, torch.zeros_like(x))
