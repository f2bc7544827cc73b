"""Sequence blocks with their keys; torch-free until one is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from bigdssm.config import HISTORY_BLOCKS, HistoryEncoderConfig
from bigdssm.utils.bounds import bounded

if TYPE_CHECKING:
    from torch import nn

register_block = HISTORY_BLOCKS.register


@register_block
@dataclass(frozen=True)
class Sasrec(HistoryEncoderConfig):
    """LayerNorm, attention and a feed-forward layer (Kang and McAuley 2018)."""

    block: str = "sasrec"
    feedforward: int = bounded(2, 1, 64)  # width of the feed-forward layer over the item vectors'

    def build(self, dim: int) -> nn.Module:
        """Return SASRec's layer."""
        from bigdssm.models.blocks import SasrecBlock

        return SasrecBlock(dim, self.heads, self.feedforward, self.dropout)


@register_block
@dataclass(frozen=True)
class Gated(Sasrec):
    """RMSNorm, attention and SwiGLU, each with a sigmoid gate, as in LiGR and eSASRec."""

    block: str = "gated"

    def build(self, dim: int) -> nn.Module:
        """Return the layer with gates."""
        from bigdssm.models.blocks import GatedBlock

        return GatedBlock(dim, self.heads, self.feedforward, self.dropout)


@register_block
@dataclass(frozen=True)
class Hstu(HistoryEncoderConfig):
    """Attention by SiLU in place of a softmax, its output gated, and no feed-forward layer (Zhai et al. 2024)."""

    softmax_attention: ClassVar[bool] = False

    block: str = "hstu"
    positions: Literal["relative"] = "relative"

    def build(self, dim: int) -> nn.Module:
        """Return HSTU's layer."""
        from bigdssm.models.blocks import HstuBlock

        return HstuBlock(dim, self.heads, self.dropout)
