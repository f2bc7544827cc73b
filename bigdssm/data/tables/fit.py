"""Fits a schema to data, vocabularies and normalisations, and turns canonical columns into what shards hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdssm.config import FeatureConfig
from bigdssm.data.tokenizer import TextEncoder
from bigdssm.schema import Feature


class SideFitter:
    """Fits the features of one side (query or document) from canonical tables, one pass, one batch at a time."""

    def __init__(self, features: Mapping[str, Feature], configs: Mapping[str, FeatureConfig]) -> None:
        self._features = features
        self._min_counts = {name: config.min_count for name, config in configs.items()}
        self._counts: dict[str, dict[str, int]] = {
            name: {} for name, f in features.items() if f.type == "categorical" and not f.hash_buckets
        }
        self._moments = {name: _Moments() for name, f in features.items() if f.type == "numeric"}

    def update(self, table: pa.Table) -> None:
        """Count the values of `table`'s rows."""
        for name, counts in self._counts.items():
            column = table.column(name).combine_chunks()
            found = pc.value_counts(column.flatten() if pa.types.is_list(column.type) else column)
            for value, count in zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True):
                counts[value] = counts.get(value, 0) + count
        for name, moments in self._moments.items():
            values = table.column(name).to_numpy()
            values = values[~np.isnan(values)]
            moments.update(np.log1p(values) if self._features[name].log else values)

    def state(self) -> dict[str, Any]:
        """Return what was counted, for `restore`."""
        return {"counts": self._counts, "moments": {name: vars(moments) for name, moments in self._moments.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what gave `state`."""
        self._counts = state["counts"]
        for name, moments in state["moments"].items():
            vars(self._moments[name]).update(moments)

    def fitted(self, *, grow: bool = False) -> dict[str, Feature]:
        """Return the features with vocabularies in order of appearance, means and deviations.

        With `grow` the features are fitted already: vocabularies get new values at their end, the rest stays.
        """
        result = dict(self._features)
        for name, counts in self._counts.items():
            known = self._features[name].vocabulary if grow else ()
            skip = {"", *known}
            new = [v for v, count in counts.items() if v not in skip and count >= self._min_counts[name]]
            result[name] = replace(result[name], vocabulary=(*known, *new))
        if not grow:
            for name, moments in self._moments.items():
                result[name] = replace(result[name], mean=moments.mean, std=moments.std)
        return result


class _Moments:
    """Mean and deviation of a stream, merged batch by batch (Chan's formula: no cancellation of large sums)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def update(self, values: np.ndarray) -> None:
        if not len(values):
            return
        total = self._count + len(values)
        delta = float(values.mean()) - self._mean
        self._squares += float(((values - values.mean()) ** 2).sum()) + delta**2 * self._count * len(values) / total
        self._mean += delta * len(values) / total
        self._count = total

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def std(self) -> float:
        deviation = (self._squares / self._count) ** 0.5 if self._count else 0.0
        return deviation if deviation > 0 else 1.0  # a constant feature is normalised to 0, not divided by 0


def encoded_type(feature: Feature, *, large: bool) -> pa.DataType:
    """Return the Arrow type of a feature in shards, or (large: offsets of 64 bits for text) in the catalogue."""
    if feature.type == "text":
        return pa.large_list(pa.int32()) if large else pa.list_(pa.int32())
    if feature.type == "numeric":
        return pa.float32()
    return pa.list_(pa.int32()) if feature.multi else pa.int32()


def encode_columns(
    table: pa.Table, features: Mapping[str, Feature], text: TextEncoder | None, *, large: bool
) -> dict[str, pa.Array]:
    """Return the encoded columns of a canonical table by feature name, of the types of `encoded_type`."""
    columns = {}
    for name, feature in features.items():
        column = table.column(name).combine_chunks()
        if feature.type == "text":
            assert text is not None, "a schema with text has a tokenizer"
            ids, offsets = text.encode(column, feature.max_tokens)
            wide, narrow = pa.LargeListArray, pa.ListArray
            columns[name] = (
                wide.from_arrays(pa.array(offsets), ids) if large else narrow.from_arrays(offsets.astype(np.int32), ids)
            )
        elif feature.type == "numeric":
            columns[name] = pa.array(column.to_numpy(zero_copy_only=False).astype(np.float32))
        elif feature.multi:
            codes = feature.encode(column.flatten().cast(pa.string()))
            offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy())]).astype(np.int32)
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes))
        else:
            columns[name] = pa.array(feature.encode(column.cast(pa.string())))
    return columns
