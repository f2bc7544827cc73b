"""The block of SASRec. Shapes: R rows, A places that ask, T places that are asked, E width."""

from __future__ import annotations

from torch import Tensor, nn

from bigdssm.config import HistoryEncoderConfig
from bigdssm.models.blocks.sight import Sight, attend, split


class SasrecBlock(nn.Module):
    """A pre-norm transformer layer whose queries may stand at fewer places than its keys.

    Source: Kang and McAuley 2018 (SASRec), eq. 2 to 6.
    """

    def __init__(self, config: HistoryEncoderConfig, dim: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, config.feedforward * dim),
            nn.GELU(),
            nn.Linear(config.feedforward * dim, dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, at: Tensor, over: Tensor, sight: Sight) -> Tensor:
        """Return [R, A, E] at places `at` [R, A, E] attending over [R, T, E]."""
        q = split(self.query(self.attention_norm(at)), self.heads)
        k, v = (split(part, self.heads) for part in self.key_value(self.attention_norm(over)).chunk(2, dim=2))
        hidden = at + self.dropout(self.output(attend(q, k, v, sight)))
        return hidden + self.dropout(self.feedforward(hidden))
