"""One side of a dataset as canonical tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from bigdssm.features.base import Feature
from bigdssm.features.columns import RowCheck
from bigdssm.features.text import texts_of


def canonical(check: RowCheck, features: Mapping[str, Feature]) -> pa.Table:
    """Return the canonical columns of all rows by feature name; rows that cannot be are failed in `check`.

    Raises DataError where a whole column has a type that the feature cannot have.
    """
    return pa.table({name: feature.read(check) for name, feature in features.items()})


def missing(table: pa.Table, features: Mapping[str, Feature]) -> np.ndarray:
    """Return which rows say nothing: every text is empty, or, without text features, every value is missing; bool."""
    empty = np.ones(table.num_rows, bool)
    for name, feature in (texts_of(features) or features).items():
        empty &= feature.is_missing(table.column(name).combine_chunks())
    return empty
