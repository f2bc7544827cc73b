"""Towers and the dual encoder; pure torch, no data."""

from bigdssm.models.cross_encoder import CrossEncoder
from bigdssm.models.dual_encoder import ALPHA_MAX, DualEncoder, Encoded, new_model
from bigdssm.models.encoders import SideSize, compile_layers, use_packing, use_plain_attention
from bigdssm.models.packed import Group, Packed, PackedLists, Spans, Values, flash_runs_on, pack
from bigdssm.models.places import Places
from bigdssm.models.scorer import MlpScorer, Scorer

__all__ = [
    "ALPHA_MAX",
    "CrossEncoder",
    "DualEncoder",
    "Encoded",
    "Group",
    "MlpScorer",
    "Packed",
    "PackedLists",
    "Places",
    "Scorer",
    "SideSize",
    "Spans",
    "Values",
    "compile_layers",
    "flash_runs_on",
    "new_model",
    "pack",
    "use_packing",
    "use_plain_attention",
]
