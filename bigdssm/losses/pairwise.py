"""Losses that look at one negative at a time: their value and slope, and the pass over the in-batch negatives.

Shape legend: m queries of this rank, N slots, r rows of a strip, c columns of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.losses.tiles import Problem, Sums, softplus

_STRIP_ROWS = 512


@dataclass(frozen=True)
class Pairwise:
    """One negative's term as a function of its score S⁻ and the positive's S⁺.

    `reduce` mean: over a query's negatives; sum: over them, with a term of the positive's own.
    """

    name: str
    margin: float = 0.0

    @property
    def relative(self) -> bool:
        """Whether the term depends on S⁻ − S⁺, and is averaged over the query's negatives."""
        return self.name != "sigmoid"

    def value_and_slope(self, S: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms and their derivative by S⁻; overwrites S. `positive` broadcasts; −inf is no negative."""
        if self.relative:
            S -= positive
        if self.name == "triplet":
            S += self.margin
            return S.clamp(min=0), (S > 0).to(S.dtype)
        return softplus(S), S.sigmoid_()

    def positive_term(self, positive_m: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positive's own term and minus its derivative by S⁺."""
        if self.relative:
            return torch.zeros_like(positive_m), torch.zeros_like(positive_m)
        return softplus(-positive_m), torch.sigmoid(-positive_m)


@dataclass
class PairSums:
    """Per query, float64 [m]: sum of its terms, of their slopes, and the best negative's score."""

    value: Tensor
    slope: Tensor
    largest: Tensor

    @staticmethod
    def zero(positive_m: Tensor) -> PairSums:
        """Start with no negatives."""
        zeros = torch.zeros_like(positive_m)
        return PairSums(zeros, zeros.clone(), zeros - math.inf)


def pairwise_pass(
    p: Problem, loss: Pairwise, positive_m: Tensor, scale_m: Tensor, copies_N: Tensor, sums: Sums | None
) -> PairSums:
    """Return the sums over the columns that are not dropped; add scale · copies · slope, as G, to `sums`."""
    result = PairSums.zero(positive_m)
    widest = max((tile.width for tile in p.columns.tiles), default=0)
    buffer = p.U_mD.new_empty(min(_STRIP_ROWS, p.num_rows) * widest)
    scale_m1, positive_m1 = scale_m.to(p.U_mD.dtype)[:, None], positive_m.to(p.U_mD.dtype)[:, None]
    copies_N = copies_N.to(p.U_mD.dtype)
    for strip in p.strips(_STRIP_ROWS):
        rows = slice(strip.start, strip.stop)
        for index in range(len(p.columns.tiles)):
            tile = p.columns.ready(index)
            W_cD = p.columns.vectors(tile)
            S_rc = p.scores(strip, tile, W_cD, buffer)
            strip.mask.fill(S_rc, tile, -math.inf)
            torch.maximum(result.largest[rows], S_rc.amax(1).double(), out=result.largest[rows])
            value_rc, slope_rc = loss.value_and_slope(S_rc, positive_m1[rows])
            copies_c = copies_N[tile.start : tile.stop]
            result.value[rows] += torch.mv(value_rc, copies_c)
            G_rc = slope_rc.mul_(copies_c)
            result.slope[rows] += G_rc.sum(1)
            if sums is None:
                continue
            G_rc.mul_(scale_m1[rows])
            if sums.dbeta_N is not None:
                sums.dbeta_N[tile.start : tile.stop] += G_rc.sum(0)
            sums.add(strip, tile, G_rc, W_cD)
    return result
