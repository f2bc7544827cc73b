"""A reference implementation of the attention kernel for packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from bigdssm.models import SequenceBounds


def within_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: SequenceBounds,
    key_bounds: SequenceBounds,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Same as flash_attention, row by row."""
    assert (
        max(query_bounds.offsets.diff()) <= query_bounds.longest
        and max(key_bounds.offsets.diff()) <= key_bounds.longest
    )
    assert query_bounds.offsets[-1] == len(q) and key_bounds.offsets[-1] == len(k) == len(v)
    parts = []
    for row in range(len(query_bounds.offsets) - 1):
        ask, asked = (
            slice(*query_bounds.offsets[row : row + 2].tolist()),
            slice(*key_bounds.offsets[row : row + 2].tolist()),
        )
        own = [part.transpose(0, 1) for part in (q[ask], k[asked], v[asked])]
        distance = torch.arange(own[0].shape[1])[:, None] - torch.arange(own[1].shape[1])
        mask = (distance >= 0) | torch.tensor(not causal)
        if window is not None:
            mask &= distance.abs() < window
        attended = torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale)
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


def by_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: SequenceBounds,
    key_bounds: SequenceBounds,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Same as flash_attention, without reading the device: it can be compiled."""
    (row_A, position_A), (row_B, position_B) = _rows(query_bounds, len(q)), _rows(key_bounds, len(k))
    sees = row_A[:, None] == row_B
    if causal:
        sees &= position_A[:, None] >= position_B
    scores = torch.einsum("ahw,bhw->hab", q, k).mul(scale).masked_fill(~sees, -1e30)
    return torch.einsum("hab,bhw->ahw", scores.softmax(-1), v)


def _rows(bounds: SequenceBounds, number: int) -> tuple[Tensor, Tensor]:
    cell = torch.arange(number, device=bounds.offsets.device)
    row = torch.searchsorted(bounds.offsets[1:].long(), cell, right=True)
    return row, cell - bounds.offsets[row]
