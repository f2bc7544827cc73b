"""What places of a history see of each other, and attention by it.

Shapes: R rows, h heads, A places that ask, T places that are asked, W width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigdssm.models.packed import Attention, Spans

HIDDEN = -1e9  # added to the score of what is not seen; not -inf, of which SiLU makes NaN
TURNS_BASE = 10_000.0


class Sight(NamedTuple):
    """Which places ask, and what they see; the same for all layers but the last, which may ask at one place alone.

    Packed histories are one row to a block: a place sees what it does within its own history. Its fields are in this
    one tuple, since torch.compile looks for all that any call had in every call.
    """

    at: Tensor  # int64 [A] or [R, A]: each place in its history
    over: Tensor  # int64 [T]
    # bool, or float with the learned bias of a distance and HIDDEN where nothing is seen: [1 or R, 1 or h, A, T]
    mask: Tensor | None  # None: packed
    fused: bool  # by the fused kernel, else multiplied out
    rotary: bool
    attention: Attention | None = None  # within packed histories, which lie at these offsets:
    at_offsets: Tensor | None = None
    over_offsets: Tensor | None = None
    at_longest: int = 0
    over_longest: int = 0
    causal: bool = False  # else all of a history is seen, which its newest place does

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the mask as what is added to scores, of their `dtype`."""
        assert self.mask is not None
        if self.mask.dtype != torch.bool:
            return self.mask.to(dtype)
        return torch.zeros_like(self.mask, dtype=dtype).masked_fill(~self.mask, HIDDEN)

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [1, A, h * W], the attention of packed histories, for q [1, h, A, W] and k, v [1, h, T, W]."""
        assert self.attention is not None and self.at_offsets is not None and self.over_offsets is not None
        at, over = Spans(self.at_offsets, self.at_longest), Spans(self.over_offsets, self.over_longest)
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        return self.attention(q, k, v, at, over, q.shape[2] ** -0.5, self.causal).flatten(1).unsqueeze(0)


def split(x: Tensor, heads: int) -> Tensor:
    """Return [R, h, A, W] for [R, A, h * W]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Return [R, A, h * W]: softmax(q kᵀ / √W) v over what is seen, for q [R, h, A, W] and k, v [R, h, T, W]."""
    if sight.rotary:
        q, k = turned(q, sight.at), turned(k, sight.over)
    if sight.mask is None:
        return sight.within(q, k, v)
    if sight.fused:
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask)
    else:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        # In bfloat16, too, softmax adds up in float32.
        attended = torch.softmax(scores + sight.bias(scores.dtype), dim=3) @ v
    return attended.transpose(1, 2).flatten(2)


def turned(x: Tensor, place: Tensor) -> Tensor:
    """Return [R, h, A, W] turned by its places [A] or [R, A]: products then depend on the distance of two places.

    Source: Su et al. 2021 (RoFormer), eq. 34; the pairs of numbers are those of both halves.
    """
    half = x.shape[3] // 2
    speed = TURNS_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = place.unsqueeze(-1) * speed
    angle = angle if place.dim() == 1 else angle.unsqueeze(1)  # all heads
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
