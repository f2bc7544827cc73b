"""Transformer blocks over histories and their attention; `declarations` has their keys.

Shapes: R rows, h heads, A query positions, T key positions, E width, F feed-forward width,
W width per head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigdssm.models.packed import Attention, RowGroup, SequenceBounds

MASKED_SCORE = -1e9  # added to masked scores; -inf would give NaN through SiLU
ROTARY_BASE = 10_000.0
SHORTEST_PERIOD, LONGEST_PERIOD = 120e6, 180 * 86_400e6  # of rotary embeddings by time, microseconds


class AttentionLayout(NamedTuple):
    """Padded layout of packed histories, in groups of similar length, for attention without a kernel."""

    query_slot: Tensor  # int64 [A]: index of each query position in the concatenated padded groups
    key_slot: Tensor  # int64 [T]
    newest_only: bool  # one query position per history
    groups: tuple[RowGroup, ...]
    masks: tuple[Tensor, ...]  # per group, as AttentionContext.mask


class AttentionContext(NamedTuple):
    """Query and key positions and the mask between them; shared by all layers, except the last one's query positions.

    Packed histories are one row of a block: a position attends within its history only. All fields are in one tuple,
    since torch.compile specializes on the set of arguments of a call.
    """

    query_position: Tensor  # int64 [A] or [R, A]: position within its history
    key_position: Tensor  # int64 [T]
    # bool, or float: the learned bias of the distance, MASKED_SCORE where masked; [1 or R, 1 or h, A, T]
    mask: Tensor | None  # None: packed
    fused: bool  # by the fused kernel, else eager
    query_angle: Tensor | None  # of rotary embeddings, [A, W / 2] or [R, A, W / 2]
    key_angle: Tensor | None
    attention: Attention | None = None  # kernel for packed histories at these offsets:
    query_offsets: Tensor | None = None
    key_offsets: Tensor | None = None
    query_longest: int = 0
    key_longest: int = 0
    causal: bool = False  # else a query position attends over its whole history
    layout: AttentionLayout | None = None  # of packed histories, without a kernel

    def apply_masked(self, attention: "MaskedAttention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [R, A, h * W]: `attention` over padded histories, or over each group of packed ones."""
        if self.layout is None:
            assert self.mask is not None
            return attention(q, k, v, self.mask).transpose(1, 2).flatten(2)
        layout = self.layout
        num_keys = [group.rows * group.longest for group in layout.groups]
        num_queries = [group.rows for group in layout.groups] if layout.newest_only else num_keys
        outputs = []
        for group, mask, *parts in zip(
            layout.groups, layout.masks, _pad_groups(q[0], layout.query_slot, num_queries),
            _pad_groups(k[0], layout.key_slot, num_keys), _pad_groups(v[0], layout.key_slot, num_keys), strict=True,
        ):  # fmt: skip
            group_q, group_k, group_v = (part.unflatten(0, (group.rows, -1)).transpose(1, 2) for part in parts)
            outputs.append(attention(group_q, group_k, group_v, mask).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs).index_select(0, layout.query_slot).unsqueeze(0)


MaskedAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""[R, h, A, W] for q [R, h, A, W], k and v [R, h, T, W], and a mask that broadcasts to [R, h, A, T]."""


def _pad_groups(x: Tensor, slot: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return [size, h, W] per group for x [h, A, W], zeros as padding."""
    return x.new_zeros((sum(sizes), x.shape[0], x.shape[2])).index_copy_(0, slot, x.transpose(0, 1)).split(sizes)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as a term to add to scores, in their `dtype`."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, MASKED_SCORE)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [R, h, A, W] for [R, A, h * W]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """Return [R, A, h * W]: masked softmax(q kᵀ / √W) v, for q [R, h, A, W] and k, v [R, h, T, W]."""
    if context.query_angle is not None and context.key_angle is not None:
        q, k = rotate(q, context.query_angle), rotate(k, context.key_angle)
    if context.attention is not None:  # a kernel, for packed histories in one row
        assert context.query_offsets is not None and context.key_offsets is not None
        query_bounds = SequenceBounds(context.query_offsets, context.query_longest)
        key_bounds = SequenceBounds(context.key_offsets, context.key_longest)
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        attended = context.attention(q, k, v, query_bounds, key_bounds, q.shape[2] ** -0.5, context.causal)
        return attended.flatten(1).unsqueeze(0)
    attention = nn.functional.scaled_dot_product_attention if context.fused else _eager_attention
    return context.apply_masked(attention, q, k, v)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    # softmax accumulates in float32 in bfloat16, too
    return torch.softmax(scores + additive_mask(mask, scores.dtype), dim=3) @ v


def position_angle(position: Tensor, number: int) -> Tensor:
    """Return the angles of rotary embeddings by positions, [..., number]. Source: Su et al. 2021 (RoFormer), eq. 34."""
    frequency = ROTARY_BASE ** (-torch.arange(number, device=position.device, dtype=torch.float32) / number)
    return position.unsqueeze(-1) * frequency


def time_angle(time: Tensor, number: int, shortest: float = SHORTEST_PERIOD, longest: float = LONGEST_PERIOD) -> Tensor:
    """Return the phases of times, int64 microseconds, in `number` periods: float32 [.., number], exact in int64."""
    exponent = torch.arange(number, device=time.device, dtype=torch.float64) / max(number - 1, 1)
    period = (shortest * (longest / shortest) ** exponent).long()
    return (time.unsqueeze(-1) % period).float() * (2 * math.pi / period.float())


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs (i, i + W / 2) of [R, h, A, W] by angles [A, W / 2] or [R, A, W / 2].

    Products of queries and keys then depend on the differences of their angles only.
    """
    half = x.shape[3] // 2
    angle = angle if angle.dim() == 2 else angle.unsqueeze(1)  # all heads
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class SasrecBlock(nn.Module):
    """A pre-norm transformer layer with possibly fewer query positions than key positions.

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

    def forward(self, x: Tensor, memory: Tensor, context: AttentionContext) -> Tensor:
        """Return [R, A, E] for `x` [R, A, E] at the query positions, attending over `memory` [R, T, E]."""
        q = split_heads(self.query(self.attention_norm(x)), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.key_value(self.attention_norm(memory)).chunk(2, dim=2))
        hidden = x + self.dropout(self.output(attend(q, k, v, context)))
        return hidden + self.dropout(self.feedforward(hidden))


class LowPassBlock(nn.Module):
    """A post-norm layer that mixes attention with a low-pass filter, an exponential moving average of the events.

    BSARec filters the Fourier transform of the whole padded history. The average depends on earlier events only, so
    that one pass gives the output at every position; BSARec's learned weights of high frequencies, about 1e-5 on Amazon
    Beauty, are left out. Source: Shin et al. 2024 (BSARec).
    """

    def __init__(
        self, dim: int, heads: int, feedforward: int, dropout: float, filter_share: float, filter_decay: float
    ) -> None:
        super().__init__()
        self.heads, self.filter_share, self.filter_decay = heads, filter_share, filter_decay
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.attention_norm, self.filter_norm, self.output_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward * dim), nn.GELU(), nn.Linear(feedforward * dim, dim)
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, context: AttentionContext) -> Tensor:
        """Return [R, A, E] for `x` [R, A, E] at the query positions, attending over `memory` [R, T, E]."""
        q = split_heads(self.query(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.key_value(memory).chunk(2, dim=2))
        attended = self.attention_norm(x + self.dropout(self.output(attend(q, k, v, context))))
        # The positions of queries and keys in place of their vectors, as one head of width 1.
        query_position, key_position = (
            position.view(-1, 1, position.shape[-1], 1) for position in (context.query_position, context.key_position)
        )
        average = context.apply_masked(self._moving_average, query_position, key_position, memory.unsqueeze(1))
        filtered = self.filter_norm(x + self.dropout(average))
        hidden = self.filter_share * filtered + (1 - self.filter_share) * attended
        return self.output_norm(hidden + self.dropout(self.feedforward(hidden)))

    def _moving_average(self, query_position: Tensor, key_position: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        distance = query_position - key_position.transpose(2, 3)
        weights = (1 - self.filter_decay) * self.filter_decay ** distance.clamp(min=0)
        return (weights * (distance >= 0)).to(values.dtype) @ values


class GatedBlock(nn.Module):
    """x + gate(norm x) * branch(norm x), for attention and then a SwiGLU feed-forward layer.

    Source: Borisyuk et al. 2025 (LiGR) for the gates; Tikhonovich et al. 2025 (eSASRec) for gates in SASRec; Shazeer
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

    def forward(self, x: Tensor, memory: Tensor, context: AttentionContext) -> Tensor:
        """Return [R, A, E] for `x` [R, A, E] at the query positions, attending over `memory` [R, T, E]."""
        normed = self.attention_norm(x)
        q = split_heads(self.query(normed), self.heads)
        normed_memory = normed if memory is x else self.attention_norm(memory)
        k, v = (split_heads(part, self.heads) for part in self.key_value(normed_memory).chunk(2, dim=2))
        gate = torch.sigmoid(self.attention_gate(normed))
        hidden = x + self.dropout(gate * self.output(attend(q, k, v, context)))
        normed = self.feedforward_norm(hidden)
        return hidden + self.dropout(torch.sigmoid(self.feedforward_gate(normed)) * self.feedforward(normed))


class SwiGlu(nn.Module):
    """A feed-forward layer: linear(SiLU(linear(x)) * linear(x))."""

    def __init__(self, dim: int, wide: int) -> None:
        super().__init__()
        self.both, self.output = nn.Linear(dim, 2 * wide), nn.Linear(wide, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return […, E] for […, E]."""
        gate, value = self.both(x).chunk(2, dim=-1)
        output: Tensor = self.output(nn.functional.silu(gate) * value)
        return output


class RootMeanSquareNorm(nn.Module):
    """RMSNorm; `nn.RMSNorm` takes 3 times as long on a CPU, forward and backward.

    Source: Zhang and Sennrich 2019, eq. 4.
    """

    EPS = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return […, E] for […, E]."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x * (1 / (size + self.EPS)) * self.weight
