"""Columns to the tensors that models take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from bigdssm.features import Feature
from bigdssm.features.ragged import Column

Features = dict[str, torch.Tensor]
"""One side's features by name, every tensor with one row per query or document, as `Feature.array` makes them.

Lists (texts, histories, several categories) are int64 [rows, T], padded at the end of a row.
"""

PadIds = dict[str, int]
"""What one side's lists are padded with, by name; features that are not in it are no lists."""


def to_features(declared: Mapping[str, Feature], columns: Mapping[str, Column], pad_token_id: int) -> Features:
    """Return columns (one per declared feature) as tensors by name."""
    return {name: as_tensor(feature.array(columns[name], pad_token_id)) for name, feature in declared.items()}


def pad_ids(declared: Mapping[str, Feature], pad_token_id: int) -> PadIds:
    """Return what the declared features that are lists are padded with."""
    padding = {name: feature.padding(pad_token_id) for name, feature in declared.items()}
    return {name: fill for name, fill in padding.items() if fill is not None}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor of the array's values, copied where the array must not be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
