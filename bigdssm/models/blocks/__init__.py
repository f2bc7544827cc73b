"""What a history's transformer is made of, by the names of `model.query.history.block`."""

from __future__ import annotations

from torch import nn

from bigdssm.models.blocks.gated import GatedBlock
from bigdssm.models.blocks.hstu import HstuBlock
from bigdssm.models.blocks.sasrec import SasrecBlock
from bigdssm.models.blocks.sight import HIDDEN, Layout, Sight

BLOCKS: dict[str, type[nn.Module]] = {"sasrec": SasrecBlock, "gated": GatedBlock, "hstu": HstuBlock}

__all__ = ["BLOCKS", "HIDDEN", "Layout", "Sight"]
