"""The types of features, one module each; see base.py. Torch-free: what a model makes of them is in models/encoders."""

from bigdssm.features.base import (
    FIRST_CODE,
    OUT_OF_VOCABULARY,
    PADDING,
    Feature,
    Reader,
    encode_columns,
    encode_values,
    register,
)
from bigdssm.features.categorical import Categorical
from bigdssm.features.history import History, histories_of, item_codes, stored
from bigdssm.features.numeric import Numeric
from bigdssm.features.ragged import Column, Ragged
from bigdssm.features.text import Text, texts_of
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.features.vector import Vector
from bigdssm.features.vocabulary import Vocabulary

__all__ = [
    "FIRST_CODE",
    "OUT_OF_VOCABULARY",
    "PADDING",
    "Categorical",
    "Column",
    "Feature",
    "History",
    "Numeric",
    "Ragged",
    "Reader",
    "Text",
    "TextTokenizer",
    "Vector",
    "Vocabulary",
    "encode_columns",
    "encode_values",
    "histories_of",
    "item_codes",
    "register",
    "stored",
    "texts_of",
]
