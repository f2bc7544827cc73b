"""Encoders, a module for each type of feature; importing this registers them."""

from bigdssm.models.encoders.base import (
    Encoder,
    Parts,
    SideSize,
    build_encoder,
    compile_layers,
    encodes,
    use_packing,
    use_plain_attention,
)
from bigdssm.models.encoders.bert import BertEncoder
from bigdssm.models.encoders.history import HistoryEncoder
from bigdssm.models.encoders.scalar import CategoricalEncoder, NumericEncoder, VectorEncoder
from bigdssm.models.encoders.text import TextEncoder, text_architectures, text_configs, text_keys

__all__ = [
    "BertEncoder",
    "CategoricalEncoder",
    "Encoder",
    "HistoryEncoder",
    "NumericEncoder",
    "Parts",
    "SideSize",
    "TextEncoder",
    "VectorEncoder",
    "build_encoder",
    "compile_layers",
    "encodes",
    "text_architectures",
    "text_configs",
    "text_keys",
    "use_packing",
    "use_plain_attention",
]
