"""Datasets on disk, and the exact stream of their rows.

Here stands the dataset itself: its files, its rows, and batches of them. `tables` has what comes before it, `making`
writes it, `streaming` brings its rows to the steps.
"""

from bigdssm.data.batch import Batch, Features
from bigdssm.data.catalogue import Catalogue
from bigdssm.data.collate import Collator
from bigdssm.data.dataset import Dataset
from bigdssm.data.rows import Rows
from bigdssm.data.streaming.plain_stream import PlainStream
from bigdssm.data.streaming.row_stream import RowStream
from bigdssm.data.streaming.stream import PairStream
from bigdssm.features.ragged import Ragged

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
