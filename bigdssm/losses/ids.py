"""Ids of 64 bits: numbered, grouped and found. On a device nothing here has the host wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_BUCKETS_PER_ID = 16  # of a hash table: so few ids share a bucket
_GOLDEN = 0x1E3779B97F4A7C15  # odd: ids that differ in any bits differ in the top ones of their products


@dataclass
class Groups:
    """Integers grouped by key, end to end: group k is values[start[k] : start[k + 1]]."""

    start: Tensor
    values: Tensor

    def lengths(self) -> Tensor:
        """Return the number of members of each group."""
        return self.start.diff()

    def first(self) -> Tensor:
        """Return each group's first member, anything where it has none."""
        return self.values[self.start[:-1].clamp(max=self.values.shape[0] - 1)]

    @staticmethod
    def ranges(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return (k, 0 … lengths[k] − 1) for every k, end to end; `total` is the sum of the lengths."""
        ends, at = torch.cumsum(lengths, 0), torch.arange(total, device=lengths.device)
        which = torch.searchsorted(ends, at, right=True)
        return which, at - (ends - lengths)[which]


def occurrences(numbers: Tensor, limit: int) -> Tensor:
    """Return how often each of 0 … limit − 1 is among the int64 `numbers`; bincount would wait for a device."""
    return numbers.new_zeros(limit).index_add_(0, numbers, torch.ones_like(numbers))


class Numbers:
    """Ids [n] numbered by value, from 0; equal ids share a number, and all numbers are below `limit`."""

    def __init__(self, ids: Tensor) -> None:
        """On a device `limit` is n, beyond what numbers there are: how many is not known to the host."""
        self._sorted, order = torch.sort(ids, stable=True)
        numbers = torch.zeros_like(ids)
        torch.cumsum(self._sorted[1:] != self._sorted[:-1], 0, out=numbers[1:])
        self.of_ids = torch.empty_like(ids).index_copy_(0, order, numbers)  # [n]
        self.limit = int(numbers[-1]) + 1 if len(ids) and ids.device.type == "cpu" else len(ids)
        start = torch.searchsorted(numbers, torch.arange(self.limit + 1, device=ids.device))
        self.places = Groups(start, order)  # of the ids, by number

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each id is among them, and its number, anything below `limit` where it is not."""
        return self._table.find(ids)

    @cached_property
    def _table(self) -> IdTable:
        return IdTable(Groups(self.places.start, self._sorted).first())


class IdTable:
    """Finds ids among others; on a CPU by hashing: a sixth of a binary search's time where many are found in few."""

    def __init__(self, sorted_ids: Tensor) -> None:
        """`sorted_ids` are distinct; on a device the last may be repeated."""
        self._ids, number = sorted_ids, sorted_ids.shape[0]
        if sorted_ids.device.type != "cpu":
            return
        self._bits = max(1, _BUCKETS_PER_ID * number).bit_length()
        bucket = self._bucket(sorted_ids)
        self._at = torch.zeros(1 << self._bits, dtype=torch.int64)
        self._at[bucket] = torch.arange(number)
        self._shared = torch.bincount(bucket, minlength=1 << self._bits) > 1

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each id is among those of the table, and where."""
        if self._ids.shape[0] == 0 or ids.device.type != "cpu":
            return search(self._ids, ids)
        bucket = self._bucket(ids)
        at = self._at[bucket]
        there = self._ids[at] == ids
        again = (~there).nonzero().squeeze(1)
        again = again[self._shared[bucket[again]]]
        there[again], at[again] = search(self._ids, ids[again])
        return there, at

    def _bucket(self, ids: Tensor) -> Tensor:
        top = (ids * _GOLDEN).bitwise_right_shift_(63 - self._bits)
        return top.bitwise_and_((1 << self._bits) - 1)


def search(sorted_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each id is among `sorted_ids`, and where."""
    if sorted_ids.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    at = torch.searchsorted(sorted_ids, ids.contiguous()).clamp_(max=sorted_ids.shape[0] - 1)
    return sorted_ids[at] == ids, at
