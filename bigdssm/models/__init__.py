"""Towers, encoders and the dual encoder. Importing the package does not import torch."""

from typing import TYPE_CHECKING

from bigdssm.utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from bigdssm.models.dual_encoder import ALPHA_MAX, DualEncoder, Encoded, new_model
    from bigdssm.models.encoders import SideSize, compile_layers, use_eager_attention, use_packing
    from bigdssm.models.packed import (
        Packed,
        PackedLists,
        QueryPositions,
        RowGroup,
        SequenceBounds,
        Values,
        flash_runs_on,
        pack,
    )

__all__ = [
    "ALPHA_MAX",
    "DualEncoder",
    "Encoded",
    "Packed",
    "PackedLists",
    "QueryPositions",
    "RowGroup",
    "SequenceBounds",
    "SideSize",
    "Values",
    "compile_layers",
    "flash_runs_on",
    "new_model",
    "pack",
    "use_eager_attention",
    "use_packing",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "bigdssm.models.dual_encoder": ["ALPHA_MAX", "DualEncoder", "Encoded", "new_model"],
        "bigdssm.models.encoders": ["SideSize", "compile_layers", "use_packing", "use_eager_attention"],
        "bigdssm.models.packed": [
            "Packed",
            "PackedLists",
            "QueryPositions",
            "RowGroup",
            "SequenceBounds",
            "Values",
            "flash_runs_on",
            "pack",
        ],
    },
)
