"""How much the lists of one side hold, counted on the host as they are made: no later step reads them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bigdssm.dataset.tensors import Features, PadIds


@dataclass(frozen=True)
class ListLengths:
    """Of one feature that is a list (tokens, history items, several values)."""

    filled: np.ndarray  # int64 [rows]: cells that hold something
    used: np.ndarray  # int64 [rows]: cells up to the last that does
    width: int  # columns of its tensor
    fill: int  # what pads it

    def take(self, rows: Tensor) -> ListLengths:
        """Return those of the given rows, int64."""
        at = rows.cpu().numpy()
        return ListLengths(self.filled[at], self.used[at], self.width, self.fill)


Lengths = Mapping[str, ListLengths]
"""By feature; those that are no lists are not in it."""


def lengths_of(features: Features, pad_ids: PadIds) -> Lengths:
    """Return the lengths of one side's lists; the tensors are the host's."""
    return {name: _lengths(features[name].numpy(), fill) for name, fill in pad_ids.items()}


def _lengths(values: np.ndarray, fill: int) -> ListLengths:
    filled = values != fill
    num_rows, width = filled.shape
    from_end = filled[:, ::-1].argmax(axis=1) if width else np.zeros(num_rows, np.int64)
    count = filled.sum(axis=1, dtype=np.int64)
    return ListLengths(count, np.where(count > 0, width - from_end, 0), width, fill)
