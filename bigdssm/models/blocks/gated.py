"""A block whose branches are gated. Shapes: R rows, A places that ask, T places that are asked, E width, F wide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigdssm.config import HistoryEncoderConfig
from bigdssm.models.blocks.sight import Sight, attend, split


class GatedBlock(nn.Module):
    """x + gate(norm x) * branch(norm x), for attention and then a SwiGLU feed-forward layer.

    Source: Borisyuk et al. 2025 (LiGR) for the gates; Tikhonovich et al. 2025 (eSASRec) for them in SASRec; Shazeer
    2020 for SwiGLU.
    """

    def __init__(self, config: HistoryEncoderConfig, dim: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm, self.feedforward_norm = RootMeanSquareNorm(dim), RootMeanSquareNorm(dim)
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feedforward = SwiGlu(dim, config.feedforward * dim)
        self.attention_gate, self.feedforward_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, at: Tensor, over: Tensor, sight: Sight) -> Tensor:
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
