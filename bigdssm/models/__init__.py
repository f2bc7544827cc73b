"""Towers and the dual encoder; pure torch, no data."""

from bigdssm.models.dual_encoder import ALPHA_MAX, DualEncoder, Encoded, new_model
from bigdssm.models.encoders import SideSize, compile_layers, use_packing, use_plain_attention
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
from bigdssm.models.scorers import CrossEncoder, MlpScorer, Scorer

__all__ = [
    "ALPHA_MAX",
    "CrossEncoder",
    "DualEncoder",
    "Encoded",
    "MlpScorer",
    "Packed",
    "PackedLists",
    "QueryPositions",
    "RowGroup",
    "Scorer",
    "SequenceBounds",
    "SideSize",
    "Values",
    "compile_layers",
    "flash_runs_on",
    "new_model",
    "pack",
    "use_packing",
    "use_plain_attention",
]
