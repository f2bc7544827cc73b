"""Transformer blocks over histories and their attention; `declarations` has their keys.

Shapes: R rows, h heads, A query positions, T key positions, E width, F feed-forward width,
W width per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigdssm.models.packed import Attention, RowGroup, SequenceBounds

HIDDEN = -1e9  # added to the score of what is not seen; not -inf, of which SiLU makes NaN
TURNS_BASE = 10_000.0


class AttentionLayout(NamedTuple):
    """Where places of packed histories stand while they are attended over without a kernel: in groups, padded."""

    at: Tensor  # int64 [A]: among the places of all groups, one group behind the other
    over: Tensor  # int64 [T]
    newest_alone: bool  # one place of each history asks
    groups: tuple[RowGroup, ...]
    masks: tuple[Tensor, ...]  # of each group, as AttentionContext.mask


class AttentionContext(NamedTuple):
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
    layout: AttentionLayout | None = None  # of packed histories, without a kernel

    def each(self, by_mask: ByMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [R, A, h * W], attention `by_mask` of padded histories, or of each group of packed ones."""
        if self.layout is not None:
            attended: Tensor = _in_groups(self.layout, by_mask, q[0], k[0], v[0])
            return attended.unsqueeze(0)
        assert self.mask is not None
        return by_mask(q, k, v, self.mask).transpose(1, 2).flatten(2)

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [1, A, h * W], attention of packed histories by a kernel, for q [1, h, A, W], k and v [1, h, T, W]."""
        assert self.attention is not None and self.at_offsets is not None and self.over_offsets is not None
        at, over = (
            SequenceBounds(self.at_offsets, self.at_longest),
            SequenceBounds(self.over_offsets, self.over_longest),
        )
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        return self.attention(q, k, v, at, over, q.shape[2] ** -0.5, self.causal).flatten(1).unsqueeze(0)


ByMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""[R, h, A, W] for q [R, h, A, W], k and v [R, h, T, W], and a mask that broadcasts to [R, h, A, T]."""


def _in_groups(layout: AttentionLayout, by_mask: ByMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return [A, h * W] for q [h, A, W], k and v [h, T, W]."""
    num_over = [group.rows * group.longest for group in layout.groups]
    num_at = [group.rows for group in layout.groups] if layout.newest_alone else num_over
    found = []
    for group, mask, *parts in zip(
        layout.groups, layout.masks, _laid(q, layout.at, num_at), _laid(k, layout.over, num_over),
        _laid(v, layout.over, num_over), strict=True,
    ):  # fmt: skip
        own_q, own_k, own_v = (part.unflatten(0, (group.rows, -1)).transpose(1, 2) for part in parts)
        found.append(by_mask(own_q, own_k, own_v, mask).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(found).index_select(0, layout.at)


def _laid(x: Tensor, place: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return each group's [size, h, W] of x [h, A, W], zeros where its rows end earlier."""
    return x.new_zeros((sum(sizes), x.shape[0], x.shape[2])).index_copy_(0, place, x.transpose(0, 1)).split(sizes)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores, of their `dtype`."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, HIDDEN)


def split(x: Tensor, heads: int) -> Tensor:
    """Return [R, h, A, W] for [R, A, h * W]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, sight: AttentionContext) -> Tensor:
    """Return [R, A, h * W]: softmax(q kᵀ / √W) v over what is seen, for q [R, h, A, W] and k, v [R, h, T, W]."""
    if sight.rotary:
        q, k = turned(q, sight.at), turned(k, sight.over)
    if sight.attention is not None:
        return sight.within(q, k, v)
    return sight.each(nn.functional.scaled_dot_product_attention if sight.fused else _multiplied_out, q, k, v)


def _multiplied_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    # In bfloat16, too, softmax adds up in float32.
    return torch.softmax(scores + added(mask, scores.dtype), dim=3) @ v


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


class SasrecBlock(nn.Module):
    """A pre-norm transformer layer whose queries may stand at fewer places than its keys.

    Source: Kang and McAuley 2018 (SASRec), eq. 2 to 6.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, feedforward * dim),
            nn.GELU(),
            nn.Linear(feedforward * dim, dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, at: Tensor, over: Tensor, sight: AttentionContext) -> Tensor:
        """Return [R, A, E] at places `at` [R, A, E] attending over [R, T, E]."""
        q = split(self.query(self.attention_norm(at)), self.heads)
        k, v = (split(part, self.heads) for part in self.key_value(self.attention_norm(over)).chunk(2, dim=2))
        hidden = at + self.dropout(self.output(attend(q, k, v, sight)))
        return hidden + self.dropout(self.feedforward(hidden))


class GatedBlock(nn.Module):
    """x + gate(norm x) * branch(norm x), for attention and then a SwiGLU feed-forward layer.

    Source: Borisyuk et al. 2025 (LiGR) for the gates; Tikhonovich et al. 2025 (eSASRec) for them in SASRec; Shazeer
    2020 for SwiGLU.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = RootMeanSquareNorm(dim), RootMeanSquareNorm(dim)
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feedforward = SwiGlu(dim, feedforward * dim)
        self.attention_gate, self.feedforward_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, at: Tensor, over: Tensor, sight: AttentionContext) -> Tensor:
        """Return [R, A, E] at places `at` [R, A, E] attending over [R, T, E]."""
        normed = self.attention_norm(at)
        q = split(self.query(normed), self.heads)
        normed_over = normed if over is at else self.attention_norm(over)
        k, v = (split(part, self.heads) for part in self.key_value(normed_over).chunk(2, dim=2))
        gate = torch.sigmoid(self.attention_gate(normed))
        hidden = at + self.dropout(gate * self.output(attend(q, k, v, sight)))
        normed = self.feedforward_norm(hidden)
        return hidden + self.dropout(torch.sigmoid(self.feedforward_gate(normed)) * self.feedforward(normed))


class SwiGlu(nn.Module):
    """A feed-forward layer: the product of a linear layer and SiLU of another, through a third."""

    def __init__(self, dim: int, wide: int) -> None:
        super().__init__()
        self.both, self.output = nn.Linear(dim, 2 * wide), nn.Linear(wide, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return […, E] for […, E]."""
        gate, value = self.both(x).chunk(2, dim=-1)
        output: Tensor = self.output(nn.functional.silu(gate) * value)
        return output


class RootMeanSquareNorm(nn.Module):
    """x over its root mean square, times a weight. Source: Zhang and Sennrich 2019, eq. 4.

    Written with a norm, since on a CPU `nn.RMSNorm` takes 3 times as long, forward and backward.
    """

    EPS = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return […, E] for […, E]."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x * (1 / (size + self.EPS)) * self.weight


class HstuBlock(nn.Module):
    """Attention without a softmax: each place's weight is SiLU of its score, and U gates what comes of it.

    The sum is divided by the number of places that are seen, where the authors divide by the longest history's: then
    padding changes nothing, and the norm behind it takes the scale out either way. Source: Zhai et al. 2024 (HSTU),
    eq. 1 to 3.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.attended_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # One linear layer in two halves, U and Q, K and V: the last layer needs the first where it is read alone.
        self.gate_query, self.key_value = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, at: Tensor, over: Tensor, sight: AttentionContext) -> Tensor:
        """Return [R, A, E] at places `at` [R, A, E] attending over [R, T, E]."""
        normed = self.norm(at)
        normed_over = normed if over is at else self.norm(over)
        gate, query = nn.functional.silu(self.gate_query(normed)).chunk(2, dim=2)
        key, value = nn.functional.silu(self.key_value(normed_over)).chunk(2, dim=2)
        q, k, v = (split(part, self.heads) for part in (query, key, value))
        attended = sight.each(_pointwise, q, k, v) / (sight.at + 1).unsqueeze(-1)
        return at + self.output(self.dropout(gate * self.attended_norm(attended)))


def _pointwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    return nn.functional.silu(scores + added(mask, scores.dtype)) @ v
