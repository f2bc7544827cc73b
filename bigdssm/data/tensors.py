"""Columns to the tensors that models take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from bigdssm.data.batch import Features, PadIds
from bigdssm.data.ragged import Column, Ragged
from bigdssm.schema import PADDING, Feature


def to_features(declared: Mapping[str, Feature], columns: Mapping[str, Column], pad_token_id: int) -> Features:
    """Return columns (one per declared feature) as tensors in the form that `Features` describes."""
    return {name: to_tensor(feature, columns[name], pad_token_id) for name, feature in declared.items()}


def pad_ids(declared: Mapping[str, Feature], pad_token_id: int) -> PadIds:
    """Return what the declared features are padded with where it is not 0: the tokenizer's padding, in texts."""
    return {name: pad_token_id for name, feature in declared.items() if feature.type == "text" and pad_token_id}


def to_tensor(feature: Feature, column: Column, pad_token_id: int) -> torch.Tensor:
    """Return one column as a tensor: ragged ones padded to int64 [rows, longest row, at least 1]."""
    if isinstance(column, Ragged):
        return torch.from_numpy(column.padded(pad_token_id if feature.type == "text" else PADDING))
    dtype = np.float32 if feature.type == "numeric" else np.int64
    return as_tensor(np.asarray(column, dtype))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor of the array's values, copied where the array must not be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
