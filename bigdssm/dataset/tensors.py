"""Conversion of columns to the input tensors of models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from bigdssm.features import Feature
from bigdssm.features.ragged import Column

Features = dict[str, torch.Tensor]
"""The features of one side by name, one tensor row per query or document, see `Feature.array`.

Lists (texts, histories, several categories) are int64 [rows, T], right-padded.
"""

PadIds = dict[str, int]
"""The padding value of each list feature of one side; other features have no entry."""


def to_features(declared: Mapping[str, Feature], columns: Mapping[str, Column], pad_token_id: int) -> Features:
    """Convert columns (one per declared feature) to tensors by name."""
    return {name: as_tensor(feature.array(columns[name], pad_token_id)) for name, feature in declared.items()}


def pad_ids(declared: Mapping[str, Feature], pad_token_id: int) -> PadIds:
    """Return the padding values of the list features."""
    padding = {name: feature.padding(pad_token_id) for name, feature in declared.items()}
    return {name: fill for name, fill in padding.items() if fill is not None}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Convert an array to a tensor; read-only arrays are copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
