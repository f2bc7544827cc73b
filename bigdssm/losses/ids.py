"""64-bit ids on the device of the vectors: factorization into codes, look-up, and grouping.

On a device, no function of this module synchronizes with the host.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Groups:
    """Integers grouped by key, end to end: group k is values[start[k] : start[k + 1]]."""

    start: Tensor
    values: Tensor

    def lengths(self) -> Tensor:
        """Return the number of members of each group."""
        return self.start.diff()

    def first(self) -> Tensor:
        """Return the first member of each group; undefined for empty groups."""
        return self.values[self.start[:-1].clamp(max=self.values.shape[0] - 1)]

    @staticmethod
    def ranges(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return (k, 0 … lengths[k] − 1) for every k, end to end; `total` is the sum of the lengths."""
        ends, position = torch.cumsum(lengths, 0), torch.arange(total, device=lengths.device)
        group = torch.searchsorted(ends, position, right=True)
        return group, position - (ends - lengths)[group]


def occurrences(numbers: Tensor, limit: int) -> Tensor:
    """Count each of 0 … limit − 1 in the int64 `numbers`, like bincount, which synchronizes with a device."""
    return numbers.new_zeros(limit).index_add_(0, numbers, torch.ones_like(numbers))


class FactorizedIds:
    """Ids [n] factorized into integer codes by value, from 0 (pandas.factorize); all codes are below `limit`."""

    def __init__(self, ids: Tensor) -> None:
        """On a device, `limit` is n, an upper bound: reading the number of unique ids would synchronize."""
        self._sorted, order = torch.sort(ids, stable=True)
        sorted_codes = torch.zeros_like(ids)
        torch.cumsum(self._sorted[1:] != self._sorted[:-1], 0, out=sorted_codes[1:])
        self.codes = torch.empty_like(ids).index_copy_(0, order, sorted_codes)  # [n]
        self.limit = int(sorted_codes[-1]) + 1 if len(ids) and ids.device.type == "cpu" else len(ids)
        start = torch.searchsorted(sorted_codes, torch.arange(self.limit + 1, device=ids.device))
        self.positions = Groups(start, order)  # positions of the ids, grouped by code

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each id is present, and its code; the code of an absent id is undefined but below `limit`."""
        return search(self._distinct, ids)

    @cached_property
    def _distinct(self) -> Tensor:
        """Return the distinct ids, sorted; on a device, the last one may be repeated."""
        return Groups(self.positions.start, self._sorted).first()


def search(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each id is in `sorted_ids`, and its index there."""
    if sorted_ids.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    index = torch.searchsorted(sorted_ids, ids.contiguous()).clamp_(max=sorted_ids.shape[0] - 1)
    return sorted_ids[index] == ids, index
