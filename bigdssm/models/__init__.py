"""Towers and the dual encoder; pure torch, no data."""

from bigdssm.models.dual_encoder import ALPHA_MAX, DualEncoder, Encoded, new_model
from bigdssm.models.encoders import SideSize, use_plain_attention
from bigdssm.models.places import Places
from bigdssm.models.scorer import MlpScorer

__all__ = ["ALPHA_MAX", "DualEncoder", "Encoded", "MlpScorer", "Places", "SideSize", "new_model", "use_plain_attention"]
