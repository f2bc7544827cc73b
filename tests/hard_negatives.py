"""Files of hard negatives with given windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.utils.array_file import new_array, seal
from bigdssm.utils.atomic import new_file


def write_hard_negatives(path: Path, records: np.ndarray, dataset: Dataset) -> None:
    """Write `window_records` of a dataset's train rows to a file."""
    with new_file(path) as aside:
        new_array(aside, records.dtype, records.shape)[:] = records
        seal(aside, dataset.rows_fingerprint)
