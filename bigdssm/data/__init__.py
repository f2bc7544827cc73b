"""Datasets on disk, and the exact stream of their rows."""

from bigdssm.data.batch import Batch, Features
from bigdssm.data.catalogue import Catalogue
from bigdssm.data.collate import Collator
from bigdssm.data.dataset import Dataset
from bigdssm.data.plain_stream import PlainStream
from bigdssm.data.ragged import Ragged
from bigdssm.data.row_stream import RowStream
from bigdssm.data.rows import Rows
from bigdssm.data.stream import PairStream

__all__ = [
    "Batch",
    "Catalogue",
    "Collator",
    "Dataset",
    "Features",
    "PairStream",
    "PlainStream",
    "Ragged",
    "RowStream",
    "Rows",
]
