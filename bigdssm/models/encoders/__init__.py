"""Encoders, one module per type of feature; importing this package registers them.

Text encoders are imported when a config names them: transformers takes 5 seconds to import.
"""

from bigdssm.models.encoders.base import (
    BuildContext,
    Encoder,
    SideSize,
    build_encoder,
    compile_layers,
    encodes,
    use_eager_attention,
    use_packing,
)
from bigdssm.models.encoders.history import HistoryEncoder
from bigdssm.models.encoders.scalar import CategoricalEncoder, NumericEncoder, VectorEncoder
from bigdssm.models.encoders.text import TextEncoder, text_architectures, text_configs, text_keys

__all__ = [
    "BuildContext",
    "CategoricalEncoder",
    "Encoder",
    "HistoryEncoder",
    "NumericEncoder",
    "SideSize",
    "TextEncoder",
    "VectorEncoder",
    "build_encoder",
    "compile_layers",
    "encodes",
    "text_architectures",
    "text_configs",
    "text_keys",
    "use_eager_attention",
    "use_packing",
]
