"""What stands for the kernel that attends within packed rows, where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from bigdssm.models import SequenceBounds


def within_rows(
    q: Tensor, k: Tensor, v: Tensor, at: SequenceBounds, over: SequenceBounds, scale: float, causal: bool = False
) -> Tensor:
    """What flash_attention does, row by row."""
    assert max(at.offsets.diff()) <= at.longest and max(over.offsets.diff()) <= over.longest
    assert at.offsets[-1] == len(q) and over.offsets[-1] == len(k) == len(v)
    parts = []
    for row in range(len(at.offsets) - 1):
        ask, asked = slice(*at.offsets[row : row + 2].tolist()), slice(*over.offsets[row : row + 2].tolist())
        own = (part.transpose(0, 1) for part in (q[ask], k[asked], v[asked]))
        attended = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=causal, scale=scale)
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)
