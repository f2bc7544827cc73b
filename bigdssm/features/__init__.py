"""Types of features, one module each; see base.py. Without torch: their encoders are in models/encoders."""

from bigdssm.features.base import (
    FIRST_CODE,
    OUT_OF_VOCABULARY,
    PADDING,
    Decoder,
    Feature,
    encode_columns,
    encode_values,
    register,
)
from bigdssm.features.categorical import Categorical
from bigdssm.features.document_age import Age, age_of
from bigdssm.features.event_time import CalendarTime, Elapsed, EventTime, Session, Timestamp, timestamp_of
from bigdssm.features.history import History, histories_of, item_codes, stored_features
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
    "Age",
    "CalendarTime",
    "Categorical",
    "Column",
    "Decoder",
    "Elapsed",
    "EventTime",
    "Feature",
    "History",
    "Numeric",
    "Ragged",
    "Session",
    "Text",
    "TextTokenizer",
    "Timestamp",
    "Vector",
    "Vocabulary",
    "age_of",
    "encode_columns",
    "encode_values",
    "histories_of",
    "item_codes",
    "register",
    "stored_features",
    "texts_of",
    "timestamp_of",
]
