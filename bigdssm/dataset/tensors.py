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

Paddings = dict[str, int]
"""The padding value of each list feature of one side; other features have no entry."""


def to_features(declared: Mapping[str, Feature], columns: Mapping[str, Column]) -> Features:
    """Convert columns (one per declared feature) to tensors by name."""
    return {name: as_tensor(feature.array(columns[name])) for name, feature in declared.items()}


def paddings(declared: Mapping[str, Feature]) -> Paddings:
    """Return the padding values of the list features."""
    return {name: feature.padding for name, feature in declared.items() if feature.padding is not None}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Convert an array to a tensor; read-only arrays are copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
