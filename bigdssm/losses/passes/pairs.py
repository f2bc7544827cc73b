"""The pass for losses that look at one negative at a time.

Shape legend: m queries of this rank, N columns of all ranks, r rows of a block, c columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.losses.passes.sizes import CACHED_PAIR_ROWS, block_rows
from bigdssm.losses.passes.tiles import Gradients, ScoreMatrix

# (negatives' scores, the positive's, which broadcasts) → the terms and their slopes; may overwrite the scores
ValueAndSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    matrix: ScoreMatrix,
    value_and_slope: ValueAndSlope,
    positive_m: Tensor,
    scale_m: Tensor,
    counts_N: Tensor,
    sums: Gradients | None,
) -> PairSums:
    """Return the sums over the columns that are not masked; add scale · count · slope, as G, to `sums`."""
    result, dtype = PairSums.zero(positive_m), matrix.acc
    # of a tile: scores, terms and slopes
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
