"""A loss at several vector widths at once, so that vectors can be cut to any of them afterwards.

    out = matryoshka_loss(lambda U, W: fps_loss(U, W, positive, alpha=alpha), U, W, (192, 96, 48), normalise=True)

Shape legend: m queries and n columns of this rank, D vector size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigdssm.losses.output import LossOutput


def matryoshka_loss(
    loss: Callable[[Tensor, Tensor], LossOutput], U: Tensor, W: Tensor, widths: Sequence[int], normalise: bool
) -> LossOutput:
    """Return the mean of `loss` at the full width and at `widths`, everything else shared; statistics of the full one.

    Every rank calls it with the same widths. normalise: cut vectors get norm 1 again, for a cosine score. The scale of
    loss and gradients is that of `loss`. Source: Kusupati et al. 2022, eq. 1 with equal weights.
    """
    whole = loss(U, W)
    losses = [whole.loss, *(loss(cut(U, width, normalise), cut(W, width, normalise)).loss for width in widths)]
    return LossOutput(torch.stack(losses).mean(), whole.stats)


def cut(vectors: Tensor, width: int, normalise: bool) -> Tensor:
    """Return the first `width` entries of each vector [rows, D], with norm 1 where `normalise`."""
    first = vectors[:, :width]
    return torch.nn.functional.normalize(first, dim=1) if normalise else first
