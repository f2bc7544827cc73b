"""One side of a dataset, read and fitted: source batches to canonical tables, and features to fitted ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.features.base import Feature, Fitter
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


class SideFitter:
    """Fits the features of one side (query or document) from canonical tables, one pass, one batch at a time."""

    def __init__(self, features: Mapping[str, Feature]) -> None:
        self._features = dict(features)
        fitters = {name: feature.fitter() for name, feature in features.items()}
        self._fitters: dict[str, Fitter] = {name: fitter for name, fitter in fitters.items() if fitter is not None}

    def update(self, table: pa.Table) -> None:
        """Take in the values of `table`'s rows."""
        for name, fitter in self._fitters.items():
            fitter.update(table.column(name).combine_chunks())

    def state(self) -> dict[str, Any]:
        """Return what was learned, for `restore`."""
        return {name: fitter.state() for name, fitter in self._fitters.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what gave `state`."""
        for name, learned in state.items():
            self._fitters[name].restore(learned)

    def fitted(self, *, grow: bool = False) -> dict[str, Feature]:
        """Return the features as the values say; with `grow` they are fitted already, and only get what is new."""
        fitted = {name: fitter.fitted(self._features[name], grow=grow) for name, fitter in self._fitters.items()}
        return self._features | fitted
