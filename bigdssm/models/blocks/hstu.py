"""The block of HSTU. Shapes: R rows, h heads, A places that ask, T places that are asked, E width, W of a head."""

from __future__ import annotations

from torch import Tensor, nn

from bigdssm.config import HistoryEncoderConfig
from bigdssm.models.blocks.sight import Sight, added, split


class HstuBlock(nn.Module):
    """Attention without a softmax: each place's weight is SiLU of its score, and U gates what comes of it.

    The sum is divided by the number of places that are seen, where the authors divide by the longest history's: then
    padding changes nothing, and the norm behind it takes the scale out either way. Source: Zhai et al. 2024 (HSTU),
    eq. 1 to 3.
    """

    def __init__(self, config: HistoryEncoderConfig, dim: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm, self.attended_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # One linear layer in two halves, U and Q, K and V: the last layer needs the first where it is read alone.
        self.gate_query, self.key_value = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, at: Tensor, over: Tensor, sight: Sight) -> Tensor:
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
